"""What train.py says before it loads a model: what a step will take, and no to what cannot fit."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.loading import read_spec
from lotaqaf_jax.plan.estimate import MEMORY_FRACTION, Fit, fitting
from lotaqaf_jax.plan.hardware import GIB, Gpu, gpu_of_kind
from lotaqaf_jax.plan.memory import RESERVE, memory_of
from lotaqaf_jax.plan.seconds import seconds_of
from lotaqaf_jax.plan.sizes import FLAGS, ONE_DEVICE, Layout, Settings, Shape
from lotaqaf_jax.quant.folder import CheckpointFolder

if TYPE_CHECKING:
    from lotaqaf_jax.training import TrainConfig

__all__ = ["about_run", "check_fits", "settings_of"]

MARGIN = 1.1
"""An estimate beyond so much of the memory is refused: the formulas were within 6 % of what was measured."""

_XLA_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_XLA_DEFAULT = 0.75

_FLAGS = {
    "batch": "per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "rank": "lora_r",
    "length": "max_seq_length",
    **FLAGS,
}
"""train.py's names of what :class:`Settings` calls otherwise."""


_WORKING = {"backward": "a layer at work", "loss": "logits at work", "update": "the update at work"}


def settings_of(config: TrainConfig, length: int | None = None) -> Settings:
    """The settings of a run as the calculator takes them. ``--recompute auto`` is "block" here, which it falls back to.

    Args:
        config: the run's.
        length: tokens of a row; None for ``max_seq_length``.
    """
    return Settings(
        batch=config.per_device_train_batch_size,
        length=config.max_seq_length if length is None else length,
        accumulate=config.accumulation,
        rank=config.rank,
        recompute=_recompute(config),
        method=config.method,
        optimizer=config.ternary_optimizer if config.method == "lota" else "adamw",
        beta=config.beta > 0,
        target_modules=tuple(config.target_modules),
        float8=config.takes_float8,
        packing=config.packing,
        itemsize=jnp.dtype(config.compute_dtype).itemsize,
    )


def _recompute(config: TrainConfig) -> Any:
    if not config.gradient_checkpointing:
        return "none"
    return "block" if config.recompute == "auto" else config.recompute


def check_fits(
    config: TrainConfig,
    shape: Shape,
    device_memory: float,
    *,
    length: int | None = None,
    gpu: Gpu | None = None,
    layout: Layout = ONE_DEVICE,
) -> list[str]:
    """What a run will take on a device, as lines to print; no line says more than the estimate knows.

    Args:
        config: settings of the run.
        shape: the model.
        device_memory: bytes that XLA may use, ``memory_stats()["bytes_limit"]``.
        length: tokens of a row; None for ``max_seq_length``.
        gpu: the card, for the time of a step; None where it is not known.
        layout: how the run is spread over devices.

    Raises:
        ConfigError: the peak is more than :data:`MARGIN` times the memory, and ``skip_memory_check`` is not set; names
            the settings that would fit.
    """
    settings = settings_of(config, length)
    memory = memory_of(shape, settings, layout)
    if memory.needed > MARGIN * device_memory and not config.skip_memory_check:
        raise ConfigError(_refusal(shape, settings, layout, device_memory, memory.needed))
    held, peak = memory.held, memory.peak
    lines = [
        f"memory       about {_gib(memory.needed)} of {_gib(device_memory)} GiB with --recompute {settings.recompute}: "
        f"weights {_gib(held.total - held.adapters - held.optimizer)}, "
        f"adapters {_gib(held.adapters + held.optimizer + peak.floats + peak.gradients)}, "
        f"kept for the backward pass {_gib(peak.saved)}, {_WORKING[peak.name]} {_gib(peak.working)}"
    ]
    if config.gradient_checkpointing and config.recompute == "auto":
        other = memory_of(shape, dataclasses.replace(settings, recompute="products"), layout).needed
        lines[0] += f"; with products {_gib(other)}"
    if gpu is not None:
        seconds = seconds_of(shape, gpu, settings, layout).total
        tokens = settings.tokens * settings.accumulate * layout.replicas
        scaled = "" if gpu.measured and layout.count == 1 else " (from data sheets, not measured)"
        lines.append(f"time         about {seconds:.3g} s a step, {tokens / seconds:,.0f} tokens/s{scaled}")
    if memory.total > device_memory:
        lines.append(f"             this may not fit; to be safe: {_remedy(shape, settings, layout, device_memory)}")
    return lines


def about_run(config: TrainConfig, folder: CheckpointFolder, length: int | None = None) -> list[str]:
    """:func:`check_fits` for the first device and a checkpoint on disk; nothing on a device that tells no limit, as a
    CPU does not.

    Args:
        config: settings of the run.
        folder: the opened checkpoint, of which the headers are read.
        length: tokens of a row; None for ``max_seq_length``.

    Raises:
        ConfigError: as :func:`check_fits`, or a model that is not supported.
        CheckpointError: tensors that do not fit the config.
    """
    device = jax.local_devices()[0]
    # The same on every device of the mesh.
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None
    if limit is None:
        return []
    decoder = DecoderConfig.from_hf(folder.config)
    shape = Shape(decoder, read_spec(folder, decoder))
    layout = Layout(*config.mesh_shape)
    try:
        layout.check(shape)
    except ConfigError:  # Arrays that cannot be cut evenly are held whole, which is not reckoned with.
        return []
    return check_fits(config, shape, limit, length=length, gpu=gpu_of_kind(device.device_kind), layout=layout)


def _refusal(shape: Shape, settings: Settings, layout: Layout, limit: float, needed: int) -> str:
    return (
        f"--model: a step needs about {_gib(needed)} GiB of memory with {settings.batch} rows of {settings.length} "
        f"tokens, rank {settings.rank} and --recompute {settings.recompute}; this device has {_gib(limit)} GiB. "
        f"{_remedy(shape, settings, layout, limit)} --skip_memory_check true tries it all the same."
    )


def _remedy(shape: Shape, settings: Settings, layout: Layout, limit: float) -> str:
    """What would fit, as the end of a message: other settings; a larger share of the card, where that changes fewer of
    them; or which device."""
    fit, found = fitting(shape, settings, layout, limit), []
    if _XLA_FRACTION not in os.environ:
        larger = limit / _XLA_DEFAULT * MEMORY_FRACTION
        roomier = fitting(shape, settings, layout, larger)
        if roomier is not None and (fit is None or len(roomier.changes) < len(fit.changes)):
            share = f"{_XLA_FRACTION}={MEMORY_FRACTION} in the environment gives {_gib(larger)} GiB, where"
            found.append(f"{share} {_would(shape, settings, roomier)}")
    if fit is not None:
        found.append(_would(shape, settings, fit))
    if not found:
        small = memory_of(shape, dataclasses.replace(settings, batch=1, recompute="block"), layout)
        held, whole = _gib(small.held.total), _gib(small.needed / (1 - RESERVE))
        return (
            f"No setting of this model fits: its weights, adapters and optimizer alone take {held} GiB. Use a smaller "
            f"model or width, or a device of {whole} GiB."
        )
    return "; or ".join(found) + "."


def _would(shape: Shape, settings: Settings, fit: Fit) -> str:
    flags = [f"--{_FLAGS.get(name, name)} {value}" for name, value in fit.changes]
    if settings.recompute == "none" and fit.settings.recompute != "none":
        flags.insert(0, "--gradient_checkpointing true")
    return f"{' '.join(flags) or 'this run'} would take {_gib(memory_of(shape, fit.settings, fit.layout).needed)} GiB"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"
