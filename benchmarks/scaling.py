"""Tokens per second and memory of a training step over several devices, beside one device and beside the estimate.

    python benchmarks/scaling.py [--model qwen2.5-14b] [--layouts 1,1,1 4,1,1 1,4,1 1,2,2 1,1,4] [--rows 8]

A layout is data,fsdp,tensor. Rows are per device of data and fsdp, so that an update grows with the devices; `of
linear` is tokens/s over devices times those of the first layout. Each layout runs in a process of its own, so that the
peak of memory is its own. Before it is timed, a step of the model's first two layers is compared with one device's. The
step is the one that train.py runs with its recommended recipe; weights are random, no token is padding.
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
from agreement import batch_of
from common import environment, print_line, timed_steps, write_json
from models import random_decoder

from lotaqaf_jax.models import Decoder, DecoderConfig, QuantSpec, add_adapters
from lotaqaf_jax.models.presets import preset
from lotaqaf_jax.optim import ternary_adam
from lotaqaf_jax.parallel import make_mesh, put_rows, whole
from lotaqaf_jax.plan import Layout, Settings, estimate, gpu_of_kind, shape_of
from lotaqaf_jax.thresholds import ramped_share
from lotaqaf_jax.training.step import TrainState, make_train_step, split_model

TOLERANCE = (1e-3, 2e-2)
"""Relative differences of loss and gradient norm: bfloat16 sums in another order, and float8 scales by part."""


def adapted(options: argparse.Namespace, config: DecoderConfig, layout: tuple[int, int, int], alone: bool) -> Decoder:
    """A random model with adapters on the devices of a layout, or on the first device."""
    count = layout[0] * layout[1] * layout[2]
    mesh = None if alone or count == 1 else make_mesh(*layout, devices=jax.devices()[:count])
    model = random_decoder(config, QuantSpec(options.bits, options.group_size), stored=jnp.bfloat16, mesh=mesh)
    return add_adapters(model, options.rank, 1.0, "none", float8=bool(options.float8), surrogate="window")


def prepared(options: argparse.Namespace, model: Decoder, rows: int, length: int) -> tuple[Any, Any, Any, Any]:
    """(step, state, frozen, batch)."""
    graph, adapters, frozen = split_model(model)
    optimizer = ternary_adam(0.2)
    state = TrainState(adapters, optimizer.init(adapters), jnp.int32(0))
    if model.sharding is not None:
        state = whole(state, model.sharding.mesh)

    def share(step: jax.Array) -> jax.Array:
        return ramped_share(0.15, step, 100)

    step = make_train_step(graph, optimizer, recompute=options.recompute, packed=False, share=share, placed=state)
    return step, state, frozen, put_rows(model, batch_of(model.config.vocab_size, rows, length))


def check(options: argparse.Namespace, layout: tuple[int, int, int]) -> str:
    """Compare steps of two layers on the mesh with those of one device.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    config = dataclasses.replace(preset(options.model), num_hidden_layers=2)
    rows, found = layout[0] * layout[1] * 2, []
    for alone in (True, False):
        step, state, frozen, batch = prepared(options, adapted(options, config, layout, alone), rows, 256)
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        found.append((float(metrics.loss), float(metrics.grad_norm)))
    off = [abs(b - a) / abs(a) for a, b in zip(*found, strict=True)]
    line = f"loss off by {off[0]:.1e}, gradient norm by {off[1]:.1e}"
    if not all(value <= limit for value, limit in zip(off, TOLERANCE, strict=True)):
        sys.exit(f"{layout}: two layers on the mesh differ from one device: {line}")
    return line


def measure(options: argparse.Namespace, layout: tuple[int, int, int]) -> dict[str, Any]:
    """One line of the table."""
    config = preset(options.model)
    line: dict[str, Any] = {"layout": "x".join(map(str, layout))}
    if layout != (1, 1, 1) and not options.unchecked:
        print(f"{layout}: {check(options, layout)}", flush=True)
        jax.clear_caches()
    rows = options.rows * layout[0] * layout[1]
    step, state, frozen, batch = prepared(options, adapted(options, config, layout, False), rows, options.length)
    line |= timed_steps(step, state, frozen, batch, options.steps)[2]
    line["tokens_per_s"] = rows * options.length / line["step_s"]
    count = layout[0] * layout[1] * layout[2]
    stats = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.devices()[:count]]
    line["peak_gib"] = max(stats) / 2**30
    line |= on_paper(options, config, layout)
    return line


def on_paper(options: argparse.Namespace, config: DecoderConfig, layout: tuple[int, int, int]) -> dict[str, Any]:
    """What lotaqaf_jax.plan says of it."""
    card = gpu_of_kind(jax.devices()[0].device_kind)
    if card is None:
        return {}
    settings = Settings(
        batch=options.rows, length=options.length, rank=options.rank, recompute=options.recompute,
        optimizer="ternary_adam", float8=bool(options.float8),
    )  # fmt: skip
    shape = shape_of(config, options.bits, options.group_size, jnp.bfloat16)
    plan = estimate(shape, card, settings, Layout(*layout))
    return {"plan_gib": plan.memory.needed / 2**30, "plan_tokens_per_s": plan.tokens_per_second}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-14b")
    parser.add_argument("--layouts", nargs="+", default=["1,1,1", "4,1,1", "1,4,1", "1,2,2", "1,1,4"])
    parser.add_argument("--rows", type=int, default=8, help="of each device of data and fsdp")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--recompute", default="block")
    parser.add_argument("--float8", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--unchecked", action="store_true", help="without the comparison of two layers")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--one", action="store_true", help="measure the first layout in this process")
    options = parser.parse_args()
    layouts = [tuple(int(size) for size in layout.split(",")) for layout in options.layouts]
    if options.one:
        (data, fsdp, tensor), *_ = layouts
        write_json(options, {"line": measure(options, (data, fsdp, tensor))})
        return
    lines: list[dict[str, Any]] = []
    for layout in options.layouts:
        lines.append(_apart(layout))
        first = lines[0]
        if "tokens_per_s" in lines[-1] and "tokens_per_s" in first:
            ratio = lines[-1]["tokens_per_s"] / first["tokens_per_s"]
            lines[-1]["of_linear"] = ratio * _devices(options.layouts[0]) / _devices(layout)
        print_line(lines[-1])
    print(environment())
    write_json(options, {"lines": lines})


def _devices(layout: str) -> int:
    data, fsdp, tensor = map(int, layout.split(","))
    return data * fsdp * tensor


def _apart(layout: str) -> dict[str, Any]:
    """The line of a layout, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "line.json"
        command = [sys.executable, *sys.argv, "--layouts", layout, "--one", "--json", str(written)]
        done = subprocess.run(command, check=False)
        if done.returncode:  # it has said why; the others are measured all the same
            return {"layout": layout.replace(",", "x"), "failed": done.returncode}
        return json.loads(written.read_text())["line"]


if __name__ == "__main__":
    main()
