"""The adjusted weight on a GPU: which kernel runs, with which arguments. Equations: :mod:`lotaqaf_jax.ternary`.

One kernel makes the adjusted weight from its tile's words and adapters, or the merged words and mu instead. Where that
is no way to the weight (groups that no tile holds, act-order with an offset) it takes two in a row: the merge, and
dequantise, which is also that of merged weights. Groups that no tile holds take the merge in two parts, steps and group
sums. Ranks whose sums float16 does not hold take a plain merge. Nothing of the size (in, out) is made but the result.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.adapter import TernaryAdapter
from lotaqaf_jax.kernels.adjust.blocks import (
    AdjustBlocks,
    any_packed_blocks,
    can_pack,
    dequantize_blocks,
    merge_blocks,
    packed_blocks,
    packed_values,
    period_of,
    step_blocks,
)
from lotaqaf_jax.kernels.launch import interpreted, launch
from lotaqaf_jax.kernels.sizes import padded
from lotaqaf_jax.quant.weight import QuantizedWeight, group_length, trivial_g_idx
from lotaqaf_jax.ternary import inverse_rows, offset_of_sums, short_parts

__all__ = ["adjusted", "dequantized", "merged"]


def adjusted(
    w: QuantizedWeight, adapter: TernaryAdapter, dtype: Any, *, blocks: AdjustBlocks | None = None
) -> jax.Array:
    """:func:`lotaqaf_jax.ternary.adjusted_weight` rounded to ``dtype``, (in, out); ``blocks`` as in :func:`merged`."""
    packed = None
    if can_pack(w.bits, adapter.rank) and w.g_idx is None:
        packed = packed_blocks(w.bits, w.group_size)
        if packed is None and adapter.offset == "none" and _rows_of_group(w) % (2 * packed_values(w.bits)) == 0:
            packed = any_packed_blocks(w.bits)
    if packed is None:
        return dequantized(merged(w, adapter, blocks=blocks)[0], dtype)
    return _packed(w, adapter, blocks or packed, weight=dtype)[3]


def merged(
    w: QuantizedWeight,
    adapter: TernaryAdapter,
    *,
    count: bool = False,
    blocks: AdjustBlocks | None = None,
) -> tuple[QuantizedWeight, jax.Array]:
    """:func:`lotaqaf_jax.ternary.merge`, and the number of integers that moved in every tile.

    Args:
        w: the quantised weight.
        adapter: its adapters.
        count: whether to count; without, the second result means nothing.
        blocks: the tile, for measuring; None is the table's. It holds whole groups wherever the table's does.
    """
    packs = can_pack(w.bits, adapter.rank)
    whole = None if w.g_idx is not None else (packed_blocks if packs else merge_blocks)(w.bits, w.group_size)
    # A tile without whole groups: its offset is summed up afterwards.
    here = whole is not None and adapter.offset != "none"
    within = adapter if here else dataclasses.replace(adapter, offset="none")
    blocks = blocks or whole or (any_packed_blocks if packs else step_blocks)(w.bits)
    words, mu, moved, *_ = (_packed if packs else _plain)(w, within, blocks, count=count)
    offset: jax.Array | None = None
    if here:
        offset = mu
    elif adapter.offset != "none":
        # The sum of D over a group is the sum of A's rows times B: exact, and small.
        sum_a = w.group_sum(adapter.a.astype(jnp.float32))
        sum_d = jnp.matmul(sum_a, adapter.b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        rule = (adapter.omega, adapter.offset, adapter.offset_dtype)
        offset = offset_of_sums(w, sum_d, _group_steps(w, words), *rule)
    return dataclasses.replace(w, qweight=words, offset=offset), moved


def _packed(
    w: QuantizedWeight,
    adapter: TernaryAdapter,
    blocks: AdjustBlocks,
    *,
    count: bool = False,
    weight: Any = None,
) -> list[jax.Array]:
    """New words, mu, the counts of moved integers, and the weight in the type ``weight``: either words or weight."""
    from lotaqaf_jax.kernels.adjust.packed import packed_kernel

    values = packed_values(w.bits)
    grid, out, settings = _tiles(w, adapter, blocks, values, count=count, words=weight is None)
    # A by tile, value of the period and period, as the kernel multiplies it.
    tiles, rank = grid[1], padded(adapter.rank)
    rest = ((0, tiles * blocks.periods * values - w.shape[0]), (0, rank - adapter.rank))
    a = jnp.pad(adapter.a.astype(jnp.float16), rest).reshape(tiles, blocks.periods, values, rank).swapaxes(1, 2)
    return launch(
        packed_kernel,
        w.qweight,
        a,
        adapter.b.astype(jnp.float16),
        _inverse(w, adapter),
        w.scales,
        w.zeros,
        _thresholds(adapter.omega),
        out=[*out, jax.ShapeDtypeStruct((1, 1) if weight is None else w.shape, weight or jnp.float32)],
        grid=grid,
        **settings,
        GROUP=_rows_of_group(w) or 1,
        WEIGHT=weight is not None,
        INTERPRET=interpreted(),
    )


def _plain(w: QuantizedWeight, adapter: TernaryAdapter, blocks: AdjustBlocks, *, count: bool) -> list[jax.Array]:
    """New words, mu, and the counts of moved integers."""
    values, words = period_of(w.bits)
    grid, out, settings = _tiles(w, adapter, blocks, values, count=count, words=True)
    return launch(
        _kernels().merge_kernel,
        w.qweight,
        adapter.a.astype(jnp.float16),
        adapter.b.astype(jnp.float16),
        _inverse(w, adapter),
        _thresholds(adapter.omega),
        out=out,
        grid=grid,
        **settings,
        WORDS=words,
        GROUP=w.group_size,
    )


def _inverse(w: QuantizedWeight, adapter: TernaryAdapter) -> jax.Array:
    if adapter.offset == "none":
        return jnp.zeros((1, 1), jnp.float32)
    return inverse_rows(w, adapter.omega, adapter.offset)


def _thresholds(omega: float | jax.Array) -> jax.Array:
    """What |D| must pass, and omega in three parts, (4,) float32."""
    omega = jnp.asarray(omega, jnp.float32)
    return jnp.stack([jnp.floor(omega), *short_parts(omega)])


def _tiles(
    w: QuantizedWeight,
    adapter: TernaryAdapter,
    blocks: AdjustBlocks,
    values: int,
    *,
    count: bool,
    words: bool,
) -> tuple[tuple[int, int], list[jax.ShapeDtypeStruct], dict[str, Any]]:
    """What both kernels have in common, by the values of a period: their grid; words, mu and counts, a single number
    where not asked for; and what else a launch is told."""
    offset, dtype = adapter.offset != "none", adapter.offset_dtype
    grid = (-(-w.shape[1] // blocks.columns), -(-w.shape[0] // (blocks.periods * values)))
    out = [
        jax.ShapeDtypeStruct(w.qweight.shape if words else (1, 1), jnp.int32),
        jax.ShapeDtypeStruct((w.groups, w.shape[1]) if words and offset else (1, 1), dtype),
        jax.ShapeDtypeStruct(grid[::-1] if count else (1, 1), jnp.int32),
    ]
    settings = _sizes(w) | {
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        "rank": adapter.rank,
        "BITS": w.bits,
        "VALUES": values,
        "RANK": padded(adapter.rank),
        "OFFSET": offset,
        "DROP": 23 - min(jnp.finfo(dtype).nmant, 22),
        "FLUSH": jnp.dtype(dtype) == jnp.float16,
        "COUNT": count,
        "BLOCK_P": blocks.periods,
        "BLOCK_N": blocks.columns,
    }
    return grid, out, settings


def _sizes(w: QuantizedWeight) -> dict[str, Any]:
    """Sizes as constants: what divides them decides how wide loads are, and how values lie in registers."""
    return {"K": w.shape[0], "N": w.shape[1], "words": w.qweight.shape[0], "groups": w.groups}


def dequantized(w: QuantizedWeight, dtype: Any, *, blocks: AdjustBlocks | None = None) -> jax.Array:
    """W rounded to ``dtype``, (in, out); ``blocks`` is the tile, for measuring, and None the table's."""
    blocks = blocks or dequantize_blocks(w.bits)
    values, words = period_of(w.bits)
    n_in, n_out = w.shape
    nothing = jnp.zeros((1, 1), jnp.float32)
    (weight,) = launch(
        _kernels().dequantize_kernel,
        w.qweight,
        w.scales,
        w.zeros,
        nothing if w.offset is None else w.offset,
        jnp.zeros((1,), jnp.int32) if w.g_idx is None else w.g_idx,
        out=[jax.ShapeDtypeStruct(w.shape, dtype)],
        grid=(-(-n_out // blocks.columns), -(-n_in // (blocks.periods * values))),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **_sizes(w),
        BITS=w.bits,
        VALUES=values,
        WORDS=words,
        GROUP=_rows_of_group(w),
        OFFSET=w.offset is not None,
        BLOCK_P=blocks.periods,
        BLOCK_N=blocks.columns,
    )
    return weight


def _rows_of_group(w: QuantizedWeight) -> int:
    """Rows of a group, or 0 with act-order, where they are not consecutive."""
    if w.g_idx is not None:
        return 0
    return group_length(w.shape[0], w.group_size)


def _group_steps(w: QuantizedWeight, new_words: jax.Array) -> jax.Array:
    """Sum of T over the rows of each group, (groups, out) float32."""
    g_idx = jnp.asarray(trivial_g_idx(w.shape[0], w.group_size)) if w.g_idx is None else w.g_idx
    order = jnp.argsort(g_idx, stable=True).astype(jnp.int32)
    start = jnp.searchsorted(g_idx[order], jnp.arange(w.groups + 1)).astype(jnp.int32)
    columns = 256
    (taken,) = launch(
        _kernels().group_steps_kernel,
        w.qweight,
        new_words,
        order,
        start,
        out=[jax.ShapeDtypeStruct((w.groups, w.shape[1]), jnp.float32)],
        grid=(-(-w.shape[1] // columns), w.groups),
        num_warps=4,
        num_stages=3,
        N=w.shape[1],
        words=w.qweight.shape[0],
        BITS=w.bits,
        BLOCK_N=columns,
    )
    return taken


def _kernels() -> Any:
    """The Triton kernels, imported only where they are used."""
    from lotaqaf_jax.kernels.adjust import triton

    return triton
