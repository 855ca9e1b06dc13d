"""What every benchmark needs: the median of runs, the machine's description, and a file of results."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

__all__ = ["COPY", "environment", "layer_arguments", "seconds_of", "shape_of", "write_json"]

COPY = 4.3e12
"""Bytes a second of a device copy on an H200, read and written."""


def layer_arguments(parser: argparse.ArgumentParser) -> None:
    """How a layer is quantised and adapted, and where results go: the same flags everywhere."""
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--omega", type=float, default=14.0)
    parser.add_argument("--json", type=Path, help="write everything here")


def shape_of(text: str) -> tuple[int, int]:
    """(in, out) of "5120x13824"."""
    n_in, n_out = (int(part) for part in text.split("x"))
    return n_in, n_out


def seconds_of(run: Callable[[], Any], repeats: int = 9) -> float:
    """Median seconds of ``run``, which ends when the device has, after two runs that do not count."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def environment() -> dict[str, str]:
    """Versions and card."""
    device = jax.local_devices()[0]
    versions = {}
    for name in ("jax", "jaxlib", "triton", "jax-triton", "torch", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return {"card": device.device_kind, "capability": str(getattr(device, "compute_capability", "")), **versions}


def write_json(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write results to ``options.json``, if given, with all settings and the environment; beside, then renamed."""
    if options.json is None:
        return
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    beside = options.json.with_suffix(".part")
    beside.write_text(json.dumps({"environment": environment(), "settings": settings, **results}, indent=1))
    beside.replace(options.json)
