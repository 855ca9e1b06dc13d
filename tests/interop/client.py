"""Opens folders with GPTQModel, transformers and PEFT, and writes their logits. Has its own environment, without us.

    python client.py jobs.json

A job: {"kind", "folder", "adapter" or null, "bits", "input_ids" (.npy), "output" (.npy)}. kind "transformers": float32,
GPTQModel's exact torch kernel, the adapter by PEFT. kind "dense": the same of a 16-bit model. kind "gptqmodel":
GPTQModel's own loader and adapters, float16.
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
    from transformers import AutoModelForCausalLM, GPTQConfig

    quantized = {"quantization_config": GPTQConfig(bits=job["bits"], backend="gptq_torch")}
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype=torch.float32,
        device_map="cpu",
        **({} if job["kind"] == "dense" else quantized),
    )
    if job["adapter"] is not None:
        model = PeftModel.from_pretrained(model, job["adapter"])
    return model


def with_gptqmodel(job: dict[str, Any]) -> Any:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.adapter.adapter import Lora

    adapter = None if job["adapter"] is None else Lora(rank=None, path=job["adapter"])
    return GPTQModel.load(
        job["folder"], backend=BACKEND.GPTQ_TORCH, dtype=torch.float16, device="cpu", adapter=adapter
    ).model


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    failed = {}
    for job in jobs:
        try:
            model = (with_gptqmodel if job["kind"] == "gptqmodel" else with_transformers)(job)
            model.eval()
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(np.load(job["input_ids"])).long()).logits
            np.save(job["output"], logits.float().numpy())
        except Exception:
            failed[job["output"]] = traceback.format_exc()
    with open(sys.argv[1] + ".failed", "w", encoding="utf-8") as file:
        json.dump(failed, file)


if __name__ == "__main__":
    main()
