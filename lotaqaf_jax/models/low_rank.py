"""Adapters of the methods that LoTA-QAF is compared with, on a decoder: LoRA and QA-LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lotaqaf_jax.kernels import GroupLowRank, LowRank
from lotaqaf_jax.lora import check_settings, init_pair
from lotaqaf_jax.models.adapters import TARGET_MODULES, adapted_linears, init_stack, offset_type, with_adapters
from lotaqaf_jax.models.decoder import Decoder
from lotaqaf_jax.models.layers import Adapter, Linear
from lotaqaf_jax.qalora import Pool, check_pool

__all__ = ["add_lora", "add_qalora", "round_lora"]


def add_lora(
    model: Decoder,
    rank: int = 64,
    alpha: float | None = None,
    target_modules: Sequence[str] = TARGET_MODULES,
    *,
    seed: int = 0,
) -> Decoder:
    """Put fresh LoRA adapters on projections of ``model``, quantised or not; its output stays the same.

        y = x @ W + bias + alpha / rank * (x @ A) @ B,   A (in, rank) Kaiming uniform, B (rank, out) zeros, float32

    Args:
        model: a decoder without adapters.
        rank: inner size of the adapters.
        alpha: the product is multiplied by alpha / rank; None for the published 2 * rank.
        target_modules: names of the projections to adapt, of :data:`TARGET_MODULES`.
        seed: each adapter depends on this and on its module's name alone.

    Returns:
        A new model over the same weights, with float32 adapters that are computed in the type of the activations.

    Raises:
        ConfigError: rank or alpha out of range, or an unknown target.
        AdapterError: the model has adapters already.

    Source: LoRA, arXiv 2106.09685, with the conventions of PEFT.
    """
    alpha = 2.0 * rank if alpha is None else float(alpha)
    check_settings(rank, alpha)

    def fresh(linear: Linear, labels: np.ndarray) -> LowRank:
        a, b = init_stack(init_pair, seed, labels, *linear.shape, rank)
        return LowRank(a, b, alpha)

    return with_adapters(model, target_modules, fresh, beside=True)


def add_qalora(
    model: Decoder,
    rank: int = 64,
    alpha: float | None = None,
    target_modules: Sequence[str] = TARGET_MODULES,
    *,
    pool: Pool = "sum",
    seed: int = 0,
    offset_dtype: Any = jnp.float32,
) -> Decoder:
    """Put fresh QA-LoRA adapters on the quantised projections of ``model``; its output stays the same bit for bit.

        y = x @ W + bias + alpha / rank * pool(x) @ (A @ B),   A (groups, rank) Kaiming uniform, B (rank, out) zeros

    Args:
        model: a decoder with packed weights, without adapters.
        rank: inner size of the adapters.
        alpha: the product is multiplied by alpha / rank; None for the published 2 * rank.
        target_modules: names of the projections to adapt, of :data:`TARGET_MODULES`. A projection that is held in
            16 bit has no groups and is passed over.
        pool: "sum" of x over each group, as published, or "mean", as in the authors' code; see
            :mod:`lotaqaf_jax.qalora`.
        seed: each adapter depends on this and on its module's name alone.
        offset_dtype: the type the zero points' shifts will be stored in: float32, bfloat16 or float16.

    Returns:
        A new model over the same weights, with float32 adapters.

    Raises:
        ConfigError: a setting out of range, an unknown target, or nothing to adapt.
        AdapterError: the model has adapters already, or a merged offset.

    Source: QA-LoRA, arXiv 2309.14717.
    """
    alpha = 2.0 * rank if alpha is None else float(alpha)
    check_settings(rank, alpha)
    check_pool(pool)
    dtype = offset_type(offset_dtype)

    def fresh(linear: Linear, labels: np.ndarray) -> GroupLowRank:
        w = linear.packed
        a, b = init_stack(init_pair, seed, labels, w.groups, w.shape[1], rank)
        return GroupLowRank(a, b, alpha, pool, dtype)

    return with_adapters(model, target_modules, fresh)


def round_lora(model: Decoder) -> None:
    """Round the LoRA adapters of ``model``, in place, to the type that it computes in.

    Every product would round them anyway. In a loop over tokens this reads and rounds them once, not for every token.
    """
    for _, linear, pair in adapted_linears(model):
        if isinstance(pair, LowRank):
            linear.adapter = Adapter(
                dataclasses.replace(pair, a=pair.a.astype(model.dtype), b=pair.b.astype(model.dtype))
            )
