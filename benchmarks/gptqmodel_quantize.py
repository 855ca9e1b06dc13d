"""Quantises with GPTQModel; for quantizers.py, which starts it in an environment of its own, without us.

    python -P gptqmodel_quantize.py jobs.json        # -P: kernels.py of this folder is not the package kernels

A job: {"model", "calibration" (.npz of token ids, one array a sample), "bits", "group_size", "options", "output"}. What
is not in "options", the keywords of QuantizeConfig, is GPTQModel's default. Writes jobs.json.done: per job the seconds
of `quantize` alone and the whole config as GPTQModel completed it; and the versions.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job; returns its seconds and config."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], **job["options"])
    with np.load(job["calibration"]) as file:
        samples = [file[name].tolist() for name in sorted(file.files, key=int)]
    model = GPTQModel.load(job["model"], config, device="cpu")
    start = time.perf_counter()
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples])
    seconds = time.perf_counter() - start
    model.save(job["output"])
    with open(f"{job['output']}/quantize_config.json", encoding="utf-8") as file:
        return {"seconds": seconds, "config": json.load(file)}


def main() -> None:
    """All jobs, one after the other."""
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    done = [quantize(job) for job in jobs]
    versions = {name: metadata.version(name) for name in ("gptqmodel", "torch", "transformers", "numpy")}
    with open(sys.argv[1] + ".done", "w", encoding="utf-8") as file:
        json.dump({"jobs": done, "versions": versions}, file)


if __name__ == "__main__":
    main()
