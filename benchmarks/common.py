"""What every benchmark needs: the median of runs, the machine's description, and a file of results."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

__all__ = ["environment", "seconds_of", "write_json"]


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


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write results with the environment they were made in; beside, then renamed."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({"environment": environment(), **results}, indent=1))
    beside.replace(path)
