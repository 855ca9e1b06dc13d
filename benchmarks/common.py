"""What every benchmark needs: times, comparisons, the machine's description, and a file of results."""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = [
    "COPY",
    "copies",
    "device_seconds",
    "environment",
    "kernel_times",
    "layer_arguments",
    "print_kernels",
    "print_line",
    "relative_error",
    "seconds_of",
    "shape_of",
    "timed_steps",
    "write_json",
]

COPY = 4.3e12
"""Bytes a second of a device copy on an H200, read and written."""
CACHE = 60e6
"""Bytes that an L2 cache does not hold."""


def copies(size: float, least: int = 4) -> int:
    """How many inputs of ``size`` bytes the cache does not hold: four times as much."""
    return max(least, int(4 * CACHE / size) + 1)


def layer_arguments(parser: argparse.ArgumentParser, bits: Sequence[int] | None = None) -> None:
    """How a layer is quantised and adapted, and where results go: the same flags everywhere.

    Where ``bits`` is given, ``--bits`` takes several, and those are its default.
    """
    if bits is None:
        parser.add_argument("--bits", type=int, default=4)
    else:
        parser.add_argument("--bits", type=int, nargs="+", default=list(bits))
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


def device_seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds that the device is busy while ``run`` runs, after a run that does not count.

    All kernels, copies and fills are added up (:func:`kernel_times`), so ``run`` should do nothing on the device but
    what is measured, and end when the device has. Gaps between kernels are not in it: they are the host's.
    """
    run()
    seconds, events = [], set()
    for _ in range(repeats):
        kernels, _ = kernel_times(run)
        seconds.append(sum(taken for _, taken in kernels.values()))
        events.add(sum(calls for calls, _ in kernels.values()))
    if len(events) > 1:
        print(f"  equal runs left {sorted(events)} events on the device; the profiler may have missed some", flush=True)
    return statistics.median(seconds)


def kernel_times(run: Callable[[], Any]) -> tuple[dict[str, tuple[int, float]], float]:
    """What the device does while ``run`` runs: {kernel: (calls, seconds)}, and the seconds from first to last.

    By JAX's profiler. Numbers are taken off the names, so that the copies of an operation count as one. Exits where the
    profile has no events of a GPU.
    """
    profile = jax.profiler.ProfileOptions()
    profile.python_tracer_level = 0  # the host's calls are not looked at
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=False, profiler_options=profile):
            run()
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    devices = {e["pid"] for e in events if e.get("name") == "process_name" and "/device:GPU" in e["args"]["name"]}
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["pid"] in devices and "Stream" in e["args"]["name"]
    }
    found: dict[str, list[float]] = collections.defaultdict(list)
    ends = []
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            found[re.sub(r"[._]?\d+", "", event["name"])[:60]].append(event["dur"] / 1e6)
            ends += [event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6]
    if not ends:
        raise SystemExit(
            f"No events of a GPU in the profile: JAX runs on {jax.default_backend()!r}, and what is measured is the "
            "time of an NVIDIA card. Run this on one, with a CUDA build of JAX that may use its profiler (CUPTI)."
        )
    return {name: (len(times), sum(times)) for name, times in found.items()}, max(ends) - min(ends)


def print_kernels(run: Callable[[], Any], most: int = 40) -> dict[str, Any]:
    """Print :func:`kernel_times` as a table, the longest first, and return it."""
    kernels, seconds = kernel_times(run)
    busy = sum(time for _, time in kernels.values())
    print(f"  {1e3 * seconds:.2f} ms from first to last kernel, {1e3 * busy:.2f} ms of them in kernels")
    for name, (calls, taken) in sorted(kernels.items(), key=lambda item: -item[1][1])[:most]:
        print(f"  {1e3 * taken:9.3f} ms {calls:6d} calls {1e6 * taken / calls:9.1f} us  {name}")
    return {"seconds": seconds, "kernels": kernels}


def relative_error(found: Any, truth: Any) -> float:
    """Norm of the difference over the norm of the truth, the largest over the arrays of two trees.

    0 if and only if all values are equal; infinity where one tree holds NaN or infinity.
    """
    errors = [0.0]
    for f, t in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        if not np.array_equal(f, t):
            f, t = np.asarray(f, np.float64), np.asarray(t, np.float64)
            error = float(np.linalg.norm(f - t) / np.linalg.norm(t))
            errors.append(max(error, 1e-30) if np.isfinite(error) else float("inf"))
    return max(errors)


def print_line(line: dict[str, Any]) -> None:
    """Names and numbers of one line of a table, at once."""
    shown = {name: value for name, value in line.items() if name != "profile"}
    print(", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()), flush=True)


def timed_steps(step: Any, state: Any, frozen: Any, batch: Any, steps: int) -> tuple[Any, Any, dict[str, Any]]:
    """Compile a training step and run it ``steps`` times after a first.

    Returns:
        The program, the last state, and a line: seconds to compile, median seconds of a step, the last loss.
    """
    start = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()
    line: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        line["loss"] = float(metrics.loss)  # waits for the step
        times.append(time.perf_counter() - start)
    line["step_s"] = statistics.median(times[1:])
    return compiled, state, line


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


def write_json(options: argparse.Namespace, results: dict[str, Any], described: dict[str, str] | None = None) -> None:
    """Write results to ``options.json``, if given, with all settings and the environment; beside, then renamed.

    ``described`` is the environment of a peer that does not run on JAX.
    """
    if options.json is None:
        return
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    beside = options.json.with_suffix(".part")
    everything = {"environment": described or environment(), "settings": settings, **results}
    beside.write_text(json.dumps(everything, indent=1, default=str))
    beside.replace(options.json)
