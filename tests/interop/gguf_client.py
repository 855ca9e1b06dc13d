"""Opens GGUF files with transformers, and writes logits and tokens. Has its own environment, without us.

    python gguf_client.py jobs.json

A job: {"folder", "config" (take config.json beside the file, not what the file says), "input_ids" (.npy), "texts",
"output" (.npz)}. ``texts`` are encoded with the tokenizer in the file, where it has one.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        given = {"config": AutoConfig.from_pretrained(job["folder"])} if job["config"] else {}
        model = AutoModelForCausalLM.from_pretrained(
            job["folder"], gguf_file="model.gguf", dtype=torch.float32, **given
        ).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(np.load(job["input_ids"])).long()).logits
        tokens = []
        if job["texts"]:
            tokenizer = AutoTokenizer.from_pretrained(job["folder"], gguf_file="model.gguf")
            tokens = [tokenizer.encode(text) for text in job["texts"]]
        np.savez(job["output"], logits=logits.numpy(), tokens=json.dumps(tokens))


if __name__ == "__main__":
    main()
