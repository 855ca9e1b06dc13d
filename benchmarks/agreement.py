"""Whether whole models agree with plain JAX: what the scripts that time them check first."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lotaqaf_jax.kernels import merge_adapter
from lotaqaf_jax.kernels.choose import KERNELS
from lotaqaf_jax.models import Decoder, linears, merge
from lotaqaf_jax.optim import t_signsgd
from lotaqaf_jax.training.step import TrainState, make_train_step, split_model

__all__ = ["batch_of", "generation_gap", "kernels", "merge_differs", "step_differences", "with_random_adapters"]


@contextlib.contextmanager
def kernels(implementation: str) -> Iterator[None]:
    """All operations by one implementation; what was compiled before is forgotten, and afterwards again."""
    before = os.environ.get(KERNELS)
    os.environ[KERNELS] = implementation
    jax.clear_caches()
    try:
        yield
    finally:
        jax.clear_caches()
        if before is None:
            del os.environ[KERNELS]
        else:
            os.environ[KERNELS] = before


def with_random_adapters(model: Decoder) -> Decoder:
    """The same model, its adapters' B random: a fresh one is 0, and would move nothing."""
    for i, (_, linear) in enumerate(linears(model)):
        if (adapter := linear.adapters) is not None:
            b = jax.random.randint(jax.random.key(i), adapter.b.shape, -1, 2, jnp.int8)
            linear.set_adapters(dataclasses.replace(adapter, b=b))
    return model


def batch_of(vocab_size: int, rows: int, length: int) -> dict[str, jax.Array]:
    """Random tokens; none is padding, all are targets."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    arrays = {"input_ids": ids, "labels": ids, "positions": positions, "segment_ids": np.ones_like(ids)}
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def step_differences(model: Decoder, recompute: Any = "block", rows: int = 2, length: int = 256) -> tuple[float, float]:
    """How far a step by the kernels is from one in plain JAX.

    Returns:
        The difference of the losses over the loss; and over all adapter tensors the largest difference of the norms of
        their gradients, over the norm.
    """
    graph, adapters, frozen = split_model(model)
    batch = batch_of(model.config.vocab_size, rows, length)
    found = []
    for implementation in ("xla", "triton"):
        with kernels(implementation):
            optimizer = t_signsgd(300, "reference", stacked_axes=1, check=False)
            own = jax.tree.map(jnp.copy, adapters)  # the step donates them
            step = make_train_step(graph, optimizer, recompute=recompute, packed=False)
            _, metrics = step(TrainState(own, optimizer.init(own), jnp.int32(0)), frozen, batch)
            norms = np.sqrt(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(metrics.squares)]))
            found.append((float(metrics.loss), norms))
    (loss, norms), (other_loss, other_norms) = found
    return abs(other_loss - loss) / loss, float(np.max(np.abs(other_norms - norms) / norms))


def merge_differs(model: Decoder, *, donate: bool = False) -> list[str]:
    """Names of the projections whose merged words or mu are not plain JAX's, bit for bit.

    With ``donate`` the words of ``model`` are given up; plain JAX has seen them before.
    """
    truths = _plain_merges([(linear.packed, linear.adapters) for _, linear in linears(model)])
    wrong = []
    for (names, linear), (words, mu) in zip(linears(merge(model, donate=donate)), truths, strict=True):
        equal = np.array_equal(linear.packed.qweight, words)
        if mu is not None:
            equal &= np.array_equal(linear.packed.offset, mu)
        if not equal:
            wrong.append(names[0])
    return wrong


@jax.jit
def _plain_merges(stacks: list[tuple[Any, Any]]) -> list[tuple[jax.Array, jax.Array | None]]:
    merged = [jax.lax.map(lambda pair: merge_adapter(*pair, "xla"), stack) for stack in stacks]
    return [(weight.qweight, weight.offset) for weight in merged]


def generation_gap(model: Decoder, prompt: np.ndarray, written: np.ndarray) -> tuple[float, float]:
    """How the forward pass that trains sees tokens that were generated greedily, where its own choice is another.

    Args:
        model: the model that wrote.
        prompt: (rows, length) int32, without padding.
        written: (rows, tokens) int32.

    Returns:
        The share of tokens that are not its most likely one; and the most that the logit of one of these is below the
        greatest, in standard deviations of the logits. Rounding leaves ties open; wrong tokens are several deviations
        below.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def gaps(state: nnx.State, ids: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, state)(ids)[:, prompt.shape[1] - 1 : -1]
        chosen = jnp.take_along_axis(logits, ids[:, prompt.shape[1] :, None], axis=-1)[..., 0]
        return (logits.max(-1) - chosen) / logits.std(-1)

    found = np.concatenate(
        [gaps(state, jnp.asarray(np.concatenate(pair))[None]) for pair in zip(prompt, written, strict=True)]
    )
    return float(np.mean(found > 0)), float(found.max())
