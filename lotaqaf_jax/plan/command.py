"""The calculator's command line.

    python -m lotaqaf_jax.plan --model llama-3.3-70b --gpu h100 --count 1
    python -m lotaqaf_jax.plan --model path/to/gptq-folder --gpu h200 --count 8 --fsdp 8 --length 4096

What is not given is chosen: rows at once, recomputation and layout so that most tokens a second fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lotaqaf_jax.errors import ConfigError, LotaError
from lotaqaf_jax.models.adapters import TARGET_MODULES
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.loading import read_spec
from lotaqaf_jax.models.presets import PRESETS, preset
from lotaqaf_jax.models.registry import KNOWN_MODELS
from lotaqaf_jax.plan.estimate import MEMORY_FRACTION, Plan, Space, fastest, fitting
from lotaqaf_jax.plan.hardware import GIB, GPUS, Gpu, gpu
from lotaqaf_jax.plan.sizes import FLAGS, Settings, Shape, shape_of
from lotaqaf_jax.quant.folder import CheckpointFolder, read_json
from lotaqaf_jax.quant.formats import read_quantization

__all__ = ["about", "main", "parser", "planned", "published_rank", "read_shape"]

LARGE = 30e9
"""Parameters from which the paper halves the rank."""
MOST_CARDS = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan; exit status 0, 1 where nothing fits, 2 for an error."""
    options = parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        return _run(options)
    except LotaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m lotaqaf_jax.plan",
        description="Memory and time of a training step, estimated. What is not given is chosen for speed.",
    )
    add = found.add_argument
    add("--model", required=True, help="a size (such as llama-3.3-70b), or a folder with a config.json")
    add("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    add("--count", type=int, default=1, help="cards (1)")
    add("--batch", type=int, help="rows that a card computes at once")
    add("--rows", type=int, help="rows of an update, made of several batches where need be (64, or what --batch makes)")
    add("--length", type=int, default=1024, help="tokens of a row (1024)")
    add("--rank", type=int, help="of the adapters; without it the paper's: 64, or 32 from 30B on")
    add("--bits", type=int, help="2, 3, 4 or 8; 16: not quantised; without it a folder's own, or 4")
    add("--group_size", type=int, help="rows in a group; -1: one group; without it a folder's own, or 128")
    add("--data_parallel", dest="data", type=int, help="parts of a batch that have all weights")
    add("--fsdp", type=int, help="parts of a batch that share weights")
    add("--tensor_parallel", dest="tensor", type=int, help="cards that share rows and split every product")
    add("--recompute", choices=("auto", "block", "products", "none"), default="auto", help="auto: products or block")
    add("--method", choices=("lota", "lora", "qalora"), default="lota")
    add("--optimizer", choices=("ternary_adam", "t_signsgd"), default="ternary_adam", help="of lota")
    add("--target_modules", nargs="+", default=list(TARGET_MODULES), help="projections to adapt")
    add("--packing", action="store_true", help="several examples in a row")
    add("--memory_fraction", type=float, default=MEMORY_FRACTION, help=f"of a card, given to XLA ({MEMORY_FRACTION})")
    add("--json", action="store_true", help="print JSON")
    return found


def planned(options: argparse.Namespace) -> tuple[Plan, bool, int]:
    """The plan of a command line, read by :func:`parser`; whether it fits; and the rows that were asked for.

    Raises:
        ConfigError: a flag that is out of range, or a layout that does not make the count.
        CheckpointError: a damaged checkpoint.
    """
    for name in ("count", "batch", "rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name}: found {getattr(options, name)}, expected 1 or more.")
    shape, card = read_shape(options.model, options.bits, options.group_size), gpu(options.gpu)
    settings = Settings(
        length=options.length,
        rank=published_rank(shape.config) if options.rank is None else options.rank,
        method=options.method,
        optimizer=options.optimizer if options.method == "lota" else "adamw",
        target_modules=tuple(options.target_modules),
        float8=card.flops8 is not None,
        packing=options.packing,
    )
    space = Space(
        batches=Space.batches if options.batch is None else (options.batch,),
        recomputes=Space.recomputes if options.recompute == "auto" else (options.recompute,),
        data=options.data,
        fsdp=options.fsdp,
        tensor=options.tensor,
    )
    # With --batch alone, an update is one batch of every card.
    rows = options.rows or (64 if options.batch is None else 1)
    fraction = options.memory_fraction
    plan, fits = fastest(shape, card, options.count, settings, rows=rows, space=space, memory_fraction=fraction)
    return plan, fits, rows


def _run(options: argparse.Namespace) -> int:
    plan, fits, rows = planned(options)
    advice = [] if fits else _advice(plan, rows)
    if options.json:
        print(json.dumps({"model": options.model, **plan.as_dict(), "advice": advice}, indent=1))
    else:
        print(about(plan, options.model))
        print("\n".join([_verdict(plan)] if fits else ["does not fit.", *advice]))
    return 0 if fits else 1


def read_shape(model: str, bits: int | None = None, group_size: int | None = None) -> Shape:
    """A model's shape by its name or folder.

    Args:
        model: a name of :data:`lotaqaf_jax.models.PRESETS`, or a folder with a config.json. Where the folder holds the
            checkpoint too, every weight is planned as it is held there.
        bits: width, in place of the folder's; None for that, or 4.
        group_size: likewise, or 128.

    Raises:
        ConfigError: neither a known name nor a folder, or a config that is not supported.
        CheckpointError: a damaged checkpoint.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.lower().removesuffix("-gptq") not in PRESETS:
            raise ConfigError(f"--model {model}: no such folder, and no size of: {', '.join(PRESETS)}.")
        return shape_of(preset(model), 4 if bits is None else bits, 128 if group_size is None else group_size)
    if bits is None and group_size is None and any(folder.glob("*.safetensors")):
        checkpoint = CheckpointFolder(folder)
        config = DecoderConfig.from_hf(checkpoint.config)
        return Shape(config, read_spec(checkpoint, config))
    parsed = read_json(folder / "config.json")
    said = read_quantization(parsed)
    if said is not None:
        bits, group_size = bits or said.default.bits, group_size or said.default.group_size
    stored = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}.get(
        str(parsed.get("torch_dtype") or parsed.get("dtype")), jnp.float16
    )
    return shape_of(DecoderConfig.from_hf(parsed), bits or 4, group_size or 128, stored)


def published_rank(config: DecoderConfig) -> int:
    """The paper's rank for a model's size: that of a known model of this config, else 32 from 30 billion values on."""
    for name, known in PRESETS.items():
        if known == config and f"{name}-gptq" in KNOWN_MODELS:
            return KNOWN_MODELS[f"{name}-gptq"].rank
    layer = config.hidden_size * (2 * config.num_attention_heads * config.head_dim + 3 * config.intermediate_size)
    return 32 if layer * config.num_hidden_layers > LARGE else 64


def about(plan: Plan, model: str) -> str:
    """A plan as two tables: memory by part, time by part."""
    s, layout, memory, seconds = plan.settings, plan.layout, plan.memory, plan.seconds
    lines = [
        f"{model} on {layout.count} x {plan.gpu.name}: data {layout.data}, fsdp {layout.fsdp}, tensor {layout.tensor}",
        f"{s.method}, rank {s.rank}, {s.optimizer}, recompute {s.recompute}; "
        f"{s.batch} x {s.length} tokens at once on a card, {plan.rows} rows in an update",
        "",
        f"{'memory of a card':<24}{'GiB':>9}",
        *(f"  {name:<22}{size / GIB:9.2f}" for name, size in memory.parts() if size),
        f"  {'together':<22}{memory.total / GIB:9.2f}  of {plan.limit / GIB:.2f}; the peak is in: {memory.peak.name}",
        "",
        f"{'time of an update':<24}{'s':>9}",
        *(f"  {name:<22}{taken:9.3f}" for name, taken in seconds.parts() if taken),
        f"  {'together':<22}{seconds.total:9.3f}  {plan.tokens_per_second:,.0f} tokens/s, "
        f"{plan.steps_per_day:,.0f} updates a day",
        f"  {_basis(plan.gpu, layout.count)}",
        "",
    ]
    return "\n".join(lines)


def _basis(card: Gpu, count: int) -> str:
    if not card.measured:
        return f"scaled from an H200 by the data sheet of {card.name}; not measured"
    return "from steps measured on this card" if count == 1 else "a card as measured; what passes between cards is not"


def _verdict(plan: Plan) -> str:
    verdict = "fits."
    if plan.memory.total > 0.75 * plan.gpu.memory:
        share = plan.limit / plan.gpu.memory
        verdict += f" Set XLA_PYTHON_CLIENT_MEM_FRACTION={share:g}: XLA takes 0.75 of a card by itself."
    return verdict


def _advice(plan: Plan, rows: int) -> list[str]:
    """What would fit: other settings on these cards, and more cards."""
    lines = []
    fit = fitting(plan.shape, plan.settings, plan.layout, plan.limit, gpus_a_host=plan.gpu.host)
    if fit is not None:
        # Batches follow from rows; the rest is flags of this command.
        lines.append(f"would fit: {_flags((name, value) for name, value in fit.changes if name != 'accumulate')}")
    count = plan.layout.count
    while count < MOST_CARDS:
        count *= 2
        try:
            more, fits = fastest(
                plan.shape,
                plan.gpu,
                count,
                plan.settings,
                rows=rows,
                memory_fraction=plan.limit / plan.gpu.memory,
            )
        except ConfigError:
            continue
        if fits:
            layout = _flags((name, size) for name, size in dataclasses.asdict(more.layout).items() if size > 1)
            lines.append(f"would fit: --count {count} {layout} --recompute {more.settings.recompute}")
            break
    return lines or [f"nothing that is tried fits, up to {MOST_CARDS} of these cards"]


def _flags(changes: Iterable[tuple[str, Any]]) -> str:
    return " ".join(f"--{FLAGS.get(name, name)} {value}" for name, value in changes)
