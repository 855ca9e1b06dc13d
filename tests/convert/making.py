"""Bases and adapter models for the tests of conversion."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lotaqaf_jax.models import TARGET_MODULES, Decoder, adapted_linears, add_adapters
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.quant.folder import CheckpointFolder

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
SHARED = Path(os.environ.get("LOTAQAF_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint, from the repository or from the shared folder; None where it is in neither."""
    for folder in (CHECKPOINTS / name, SHARED / "checkpoints" / "format" / name, SHARED / "checkpoints" / name):
        if folder.is_dir():
            return folder
    return None


def adapter_model(
    base: CheckpointFolder,
    *,
    offset: Any = "reference",
    targets: Sequence[str] | None = None,
    rank: int = 8,
    omega: float = 3.0,
    offset_dtype: Any = jnp.float32,
    seed: int = 0,
) -> Decoder:
    """The base with random ternary adapters, dense enough to move some percent of the integers."""
    model = load_decoder(base, jnp.float32, progress=False)
    model = add_adapters(
        model, rank, omega, offset, TARGET_MODULES if targets is None else tuple(targets), offset_dtype=offset_dtype
    )
    rng = np.random.default_rng(seed)
    for _, linear, adapter in adapted_linears(model):
        b = jnp.asarray(rng.integers(-1, 2, adapter.b.shape).astype(np.int8))
        linear.set_adapters(dataclasses.replace(adapter, b=b))
    return model
