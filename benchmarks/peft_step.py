"""Tokens per second and memory of one training step of LoRA with PEFT: the peer of train_step.py.

    python benchmarks/peft_step.py [--model qwen2.5-14b] [--rows 8] [--length 1024] [--adapters bfloat16 float32]

The 16-bit model of the same shapes and random weights, adapters of the same rank at the same seven projections, and the
same number of tokens, all of them targets: transformers and PEFT as they come, with gradient checkpointing, PyTorch's
attention, and AdamW over the adapters alone. A line for each type that the adapters have: with float32, which is PEFT's
default, the step runs under autocast to bfloat16, as transformers' Trainer does with `bf16=True`. It prints the median
seconds of a step after two, tokens per second, and the peak of memory that PyTorch has held in arrays.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # JAX gives the model's sizes, and is to leave the card alone

import peft
import torch
import transformers
from common import print_line, write_json

from convert.hf_config import model_config
from lotaqaf_jax.models.presets import preset
from lotaqaf_jax.models.spec import PROJECTIONS


def environment(device: torch.device) -> dict[str, str]:
    """Versions and card."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    if device.type != "cuda":
        return {"card": "cpu", **versions}
    major, minor = torch.cuda.get_device_capability(device)
    card = torch.cuda.get_device_name(device)
    return {"card": card, "capability": f"{major}.{minor}", "cuda": str(torch.version.cuda), **versions}


def random_model(options: argparse.Namespace, device: torch.device, adapters: torch.dtype) -> torch.nn.Module:
    """The model with its adapters, made where it is going to be; nothing in it is zero."""
    written = model_config(preset(options.model), "bfloat16")
    if options.layers is not None:
        written["num_hidden_layers"] = options.layers
    config = transformers.AutoConfig.for_model(**written)
    torch.manual_seed(0)
    with device:  # transformers' own random weights, which are quick to draw on a card
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = peft.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=[path.rpartition(".")[2] for path in PROJECTIONS],
        init_lora_weights=False,  # B is random too
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapters)
            elif name.endswith(".bias"):
                parameter.normal_(0, 0.02)
    return model.train()


def measure(options: argparse.Namespace, device: torch.device, adapters: str) -> dict[str, Any]:
    """One line of the table."""
    kind = getattr(torch, adapters)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = random_model(options, device, kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocab_size, (options.rows, options.length), device=device)
    times, loss = [], float("nan")
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=kind != torch.bfloat16):
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        del output
    seconds = statistics.median(times[2:])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "peer": f"PEFT LoRA, {adapters} adapters",
        "trained_values": sum(parameter.numel() for parameter in trained),
        "step_s": seconds,
        "tokens_per_s": options.rows * options.length / seconds,
        "peak_gib": peak / 2**30,
        "loss": loss,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-14b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a try")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--adapters", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(environment(device), flush=True)
    lines = []
    for adapters in options.adapters:
        lines.append(measure(options, device, adapters))
        print_line(lines[-1])
        gc.collect()  # modules refer to each other; what is left would count in the next peak
        if device.type == "cuda":
            torch.cuda.empty_cache()
    write_json(options, {"lines": lines}, environment(device))


if __name__ == "__main__":
    main()
