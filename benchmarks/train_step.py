"""Tokens per second and memory of one training step, on random packed weights of a real model's shapes.

    python benchmarks/train_step.py [--model qwen2.5-14b] [--rows 8] [--length 1024] [--recompute block products none]
        [--float8 0 1] [--recipe recommended published] [--peer]

A step of the first two layers is compared with one in plain JAX. Then there is a line for each way of recomputing
activations, with and without float8 for the gradient of the weights: seconds to compile, median seconds of a step after
the first, tokens per second, and the peak of memory in use on the device. The step is the one that train.py runs:
forward and backward pass over all layers, chunked loss, optimizer; by the recommended recipe (gradient through a
window, ternary Adam, a threshold for every matrix in every step) or as published (straight, t-SignSGD, one threshold
and the reference offset). No token is padding, all are targets.

With --peer, peft_step.py runs first, as a process of its own that has the card to itself, and its lines come before
ours and again after them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # so that the peak is what was needed

import jax
import jax.numpy as jnp
from agreement import batch_of, step_differences, with_random_adapters
from common import environment, layer_arguments, print_kernels, print_line, timed_steps, write_json
from models import random_decoder

from lotaqaf_jax.models import Decoder, QuantSpec, add_adapters
from lotaqaf_jax.models.presets import preset
from lotaqaf_jax.optim import t_signsgd, ternary_adam
from lotaqaf_jax.thresholds import ramped_share
from lotaqaf_jax.training.step import TrainState, make_train_step, split_model

LAYERS = 2
"""Of the model whose step is compared with plain JAX."""
TOLERANCE = (1e-3, 2e-2)
"""Relative differences of losses and of gradients' norms: the kernels round intermediate results otherwise."""


def adapted(options: argparse.Namespace, model: Decoder, recipe: str, float8: bool) -> Decoder:
    """The model with fresh adapters of a recipe."""
    rule: Any = {"offset": "none", "surrogate": "window"} if recipe == "recommended" else {}
    return add_adapters(model, options.rank, options.omega, float8=float8, **rule)


def check(options: argparse.Namespace, recompute: Any, float8: bool, recipe: str) -> str:
    """Compare a step of the first layers with one in plain JAX.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    config = dataclasses.replace(preset(options.model), num_hidden_layers=LAYERS)
    model = random_decoder(config, QuantSpec(options.bits, options.group_size), stored=jnp.bfloat16)
    model = with_random_adapters(adapted(options, model, recipe, float8))
    found = step_differences(model, recompute)
    line = f"loss off by {found[0]:.1e}, gradients' norms by {found[1]:.1e}"
    if not all(value <= limit for value, limit in zip(found, TOLERANCE, strict=True)):
        sys.exit(
            f"{recompute}, float8 {float8}, {recipe}: the step of {LAYERS} layers differs from plain JAX's: {line}"
        )
    return line


def measure(options: argparse.Namespace, recompute: Any, float8: bool, recipe: str) -> dict[str, Any]:
    """One line of the table."""
    config = preset(options.model)
    quant = QuantSpec(options.bits, options.group_size)
    model = random_decoder(config, quant, stored=jnp.bfloat16)
    model = adapted(options, model, recipe, float8)
    graph, adapters, frozen = split_model(model)
    del model
    recommended = recipe == "recommended"
    optimizer = ternary_adam(0.2) if recommended else t_signsgd(300, "reference", stacked_axes=1, check=False)
    share = (lambda step: ramped_share(0.15, step, 300)) if recommended else None
    state = TrainState(adapters, optimizer.init(adapters), jnp.int32(0))
    batch = batch_of(config.vocab_size, options.rows, options.length)
    step = make_train_step(graph, optimizer, recompute=recompute, packed=False, share=share)
    compiled, state, timed = timed_steps(step, state, frozen, batch, options.steps)
    line: dict[str, Any] = {"recompute": recompute, "float8": float8, "recipe": recipe} | timed
    line["tokens_per_s"] = options.rows * options.length / line["step_s"]
    if options.profile:
        line["profile"] = print_kernels(lambda: jax.block_until_ready(compiled(state, frozen, batch)))
    memory = jax.local_devices()[0].memory_stats() or {}
    line["peak_gib"] = memory.get("peak_bytes_in_use", 0) / 2**30
    return line


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """What peft_step.py writes for the same shapes. JAX has not touched the card yet, and would keep what it took."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "peer.json"
        command = [sys.executable, str(Path(__file__).with_name("peft_step.py")), "--json", str(written)]
        for name in ("model", "rows", "length", "rank", "steps"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, check=False)
        if done.returncode:  # it has said why; ours are measured all the same
            return {"failed": done.returncode, "lines": []}
        return json.loads(written.read_text())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-14b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    layer_arguments(parser)
    parser.add_argument("--steps", type=int, default=6)
    # The peak of memory is one of the whole process: the leanest way first.
    parser.add_argument("--recompute", nargs="+", default=["block", "products"])
    parser.add_argument("--float8", nargs="+", type=int, default=[0, 1], help="without (0) and with (1) float8 for dW")
    parser.add_argument("--recipe", nargs="+", choices=["recommended", "published"], default=["recommended"])
    parser.add_argument("--profile", action="store_true", help="also the device's time by kernel")
    parser.add_argument("--peer", action="store_true", help="also LoRA on the 16-bit model with PEFT, before all else")
    options = parser.parse_args()
    results: dict[str, Any] = {"peer": peer(options)} if options.peer else {}
    print(environment())
    lines = []
    for recompute in options.recompute:
        for float8 in map(bool, options.float8):
            for recipe in options.recipe:
                agreed = check(options, recompute, float8, recipe)
                print(f"{recompute}, float8 {float8}, {recipe}: {agreed}", flush=True)
                lines.append(measure(options, recompute, float8, recipe))
                print_line(lines[-1])
    for line in results["peer"]["lines"] if options.peer else []:
        print_line(line)  # again, below the others
    write_json(options, {"lines": lines, **results})


if __name__ == "__main__":
    main()
