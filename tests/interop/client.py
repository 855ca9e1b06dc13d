"""Opens folders with GPTQModel, transformers and PEFT, and writes their logits. Has its own environment, without us.

    python client.py jobs.json

A job: {"kind", "folder", "adapter" or null, "bits", "input_ids" (.npy), "output" (.npy)}. kind "transformers": float32,
GPTQModel's exact torch kernel, the adapter by PEFT. kinds "dense", "compressed-tensors" and "gguf": the same of 16 bit,
of such a folder dequantised, and of a GGUF file. kind "gptqmodel": GPTQModel's own loader and adapters, float16. kinds
"awq" and "awq-gptqmodel": the two of AWQ, with the exact kernel for that. kind "mlx": mlx-lm on the CPU. kind "onnx":
ONNX Runtime, all at once. kind "onnx-genai": onnxruntime-genai, one token after the other.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import numpy as np
import torch


def with_transformers(job: dict[str, Any]) -> Any:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, CompressedTensorsConfig, GPTQConfig

    kinds = {
        "dense": {},
        "gguf": {"gguf_file": "model.gguf", "config": AutoConfig.from_pretrained(job["folder"])},
        "awq": {"quantization_config": AwqConfig(bits=job["bits"], backend="torch_awq")},
        # Dequantised on loading: packed, transformers 5.23 refuses the zero points that compressed-tensors packs.
        "compressed-tensors": {"quantization_config": CompressedTensorsConfig(run_compressed=False)},
        "transformers": {"quantization_config": GPTQConfig(bits=job["bits"], backend="gptq_torch")},
    }
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype=torch.float32,
        device_map="cpu",
        **kinds[job["kind"]],
    )
    if job["adapter"] is not None:
        model = PeftModel.from_pretrained(model, job["adapter"])
    return model


def with_gptqmodel(job: dict[str, Any]) -> Any:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.adapter.adapter import Lora

    adapter = None if job["adapter"] is None else Lora(rank=None, path=job["adapter"])
    backend = BACKEND.AWQ_TORCH if job["kind"].startswith("awq") else BACKEND.GPTQ_TORCH
    return GPTQModel.load(job["folder"], backend=backend, dtype=torch.float16, device="cpu", adapter=adapter).model


def logits_by_mlx(job: dict[str, Any]) -> np.ndarray:
    from pathlib import Path

    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["folder"]))
    return np.array(model(mx.array(np.load(job["input_ids"]))).astype(mx.float32))


def logits_by_onnxruntime(job: dict[str, Any]) -> np.ndarray:
    from pathlib import Path

    import onnxruntime

    folder, ids = Path(job["folder"]), np.load(job["input_ids"]).astype(np.int64)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    empty = np.zeros((len(ids), decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    given = {one.name: empty for one in session.get_inputs() if one.name.startswith("past_key_values")}
    return session.run(["logits"], given | {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


def logits_by_genai(job: dict[str, Any]) -> np.ndarray:
    import onnxruntime_genai as og

    model = og.Model(job["folder"])
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=64)
    rows = []
    for row in np.load(job["input_ids"]):
        generator = og.Generator(model, params)
        logits = []
        for token in row:
            generator.append_tokens([int(token)])
            logits.append(generator.get_logits()[0, -1])
        rows.append(logits)
    return np.array(rows, np.float32)


def logits_by_torch(job: dict[str, Any]) -> np.ndarray:
    model = (with_gptqmodel if job["kind"].endswith("gptqmodel") else with_transformers)(job)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(np.load(job["input_ids"])).long()).logits
    return logits.float().numpy()


READERS = {"mlx": logits_by_mlx, "onnx": logits_by_onnxruntime, "onnx-genai": logits_by_genai}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    failed = {}
    for job in jobs:
        try:
            np.save(job["output"], READERS.get(job["kind"], logits_by_torch)(job))
        except Exception:
            failed[job["output"]] = traceback.format_exc()
    with open(sys.argv[1] + ".failed", "w", encoding="utf-8") as file:
        json.dump(failed, file)


if __name__ == "__main__":
    main()
