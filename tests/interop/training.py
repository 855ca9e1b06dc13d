"""Bases with adapters that were trained, by a few steps of what train.py runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lotaqaf_jax.data import IGNORE
from lotaqaf_jax.kernels import TernaryAdapter
from lotaqaf_jax.models import (
    TARGET_MODULES,
    Decoder,
    adapted_linears,
    add_adapters,
    add_lora,
    add_qalora,
    with_omegas,
)
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.models.pretrained import load_tokenizer
from lotaqaf_jax.optim import ternary_adam
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.ternary import Offset
from lotaqaf_jax.training import make_train_step
from tests.training.test_step import start

RANK, STEPS, MOVED = 8, 6, 0.1
TEXT = (
    "Tom had a red kite. He ran up the hill with it, and the wind took it over the trees. Then the wind was gone, and "
    "the kite fell into the lake. A duck swam by and pulled it to the grass. Tom said thank you and gave it some bread."
)

Method = Literal["lota", "lora", "qalora"]


def trained(
    base: CheckpointFolder,
    method: Method = "lota",
    *,
    offset: Offset = "reference",
    targets: Sequence[str] = TARGET_MODULES,
    alpha: float = 16.0,
) -> Decoder:
    """The base in float32 with adapters of a method, trained as the recommended recipe does.

    Args:
        base: a GPTQ or 16-bit folder.
        method: "lota", whose thresholds let a tenth of the integers of ``targets`` move, and which is trained with the
            reference offset and given ``offset`` then; or "lora" or "qalora" with ``alpha``.

    Raises:
        AssertionError: the loss did not fall.
    """
    if method == "lota":
        model = nnx.clone(_trained_ternary(base.path, tuple(targets)))
        for _, linear, adapter in adapted_linears(model):
            assert isinstance(adapter, TernaryAdapter)
            linear.set_adapters(dataclasses.replace(adapter, offset=offset))
        return model
    model = load_decoder(base, jnp.float32, progress=False)
    model = (add_lora if method == "lora" else add_qalora)(model, rank=RANK, alpha=alpha)
    return train(model, optax.adam(2e-3 if method == "lora" else 1e-3), text(base.path))


@functools.cache
def _trained_ternary(path: Path, targets: tuple[str, ...]) -> Decoder:
    model = load_decoder(CheckpointFolder(path), jnp.float32, progress=False)
    return train_ternary(model, text(path), targets)


def text(folder: Path) -> np.ndarray:
    """:data:`TEXT` as four rows of 24 tokens, over and over.

    A model that was trained on random tokens would no longer be sure of anything, and what rounding does to its logits
    be large beside them.
    """
    ids = load_tokenizer(folder)(TEXT, add_special_tokens=False)["input_ids"]
    return np.resize(np.asarray(ids, np.int32), (4, 24))


def train_ternary(model: Decoder, ids: np.ndarray, targets: Sequence[str] = TARGET_MODULES) -> Decoder:
    """A model in float32 with ternary adapters and the reference offset, trained on ``ids``."""
    model = add_adapters(model, RANK, 1, "reference", targets, surrogate="window")
    return train(model, ternary_adam(0.2), ids, share=lambda step: jnp.float32(MOVED))


def train(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    ids: np.ndarray,
    share: Callable[[jax.Array], jax.Array] | None = None,
) -> Decoder:
    """:data:`STEPS` steps of all adapters of a model on ``ids`` (batch, length)."""
    labels = np.where(np.arange(ids.shape[1]) == 0, IGNORE, ids)
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
    batch = {"input_ids": ids, "labels": labels, "positions": positions, "segment_ids": np.ones_like(ids)}
    graph, state, frozen = start(model, optimizer)
    step = make_train_step(graph, optimizer, recompute="none", packed=False, share=share)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, {name: jnp.asarray(array) for name, array in batch.items()})
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0], losses
    model = nnx.merge(graph, state.adapters, frozen)
    return model if share is None else with_omegas(model, share(state.step))
