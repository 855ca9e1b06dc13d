"""The adjusted weight on a GPU: which kernel runs, with which arguments. Equations: :mod:`lotaqaf_jax.ternary`.

At 2, 4 and 8 bit one kernel makes the adjusted weight from its tile's words and adapters, or the merged words and mu
instead. Elsewhere (3 bit, groups that no tile holds, act-order with an offset) it takes two in a row: the merge, and
dequantise, which is also that of merged weights. Groups that no tile holds take the merge in two parts, steps and group
sums. Nothing of the size (in, out) is made but the result.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.adjust.blocks import (
    AdjustBlocks,
    any_packed_blocks,
    can_pack,
    dequantize_blocks,
    merge_blocks,
    packed_blocks,
    period_of,
    step_blocks,
)
from lotaqaf_jax.kernels.launch import interpreted, launch
from lotaqaf_jax.quant.weight import QuantizedWeight, trivial_g_idx
from lotaqaf_jax.ternary import Offset, inverse_rows, offset_of_sums, short_parts

__all__ = ["adjusted", "dequantized", "merged"]


def adjusted(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    omega: float,
    offset: Offset,
    offset_dtype: Any,
    dtype: Any,
    *,
    blocks: AdjustBlocks | None = None,
) -> jax.Array:
    """:func:`lotaqaf_jax.ternary.adjusted_weight` rounded to ``dtype``, (in, out); ``blocks`` as in :func:`merged`."""
    packed = None
    if _packs(w, a) and w.g_idx is None:
        values, _ = period_of(w.bits)
        packed = packed_blocks(w.bits, w.group_size)
        if packed is None and offset == "none" and _rows_of_group(w) % (2 * values) == 0:
            packed = any_packed_blocks(w.bits)
    if packed is None:
        return dequantized(merged(w, a, b, omega, offset, offset_dtype, blocks=blocks)[0], dtype)
    return _packed(w, a, b, omega, offset, offset_dtype, blocks or packed, weight=dtype)[3]


def merged(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    omega: float,
    offset: Offset,
    offset_dtype: Any,
    *,
    in_place: bool = False,
    count: bool = False,
    blocks: AdjustBlocks | None = None,
) -> tuple[QuantizedWeight, jax.Array]:
    """:func:`lotaqaf_jax.ternary.merge`, and the number of integers that moved in every tile.

    Args:
        w: the quantised weight.
        a: (in, rank), float or int8.
        b: (rank, out), float or int8.
        omega: threshold.
        offset: offset rule.
        offset_dtype: storage type of mu.
        in_place: put the new words where the old ones are, if nothing else needs them; else XLA copies them first.
        count: whether to count; without, the second result means nothing.
        blocks: the tile, for measuring; None is the table's. It holds whole groups wherever the table's does.
    """
    find = packed_blocks if _packs(w, a) else merge_blocks
    whole = None if w.g_idx is not None else find(w.bits, w.group_size)
    # A tile without whole groups: its offset is summed up afterwards, for which the old words are needed.
    here = whole is not None and offset != "none"
    in_place = in_place and (here or offset == "none")
    within: Offset = offset if here else "none"
    if _packs(w, a):
        blocks = blocks or whole or any_packed_blocks(w.bits)
        words, mu, moved, _ = _packed(w, a, b, omega, within, offset_dtype, blocks, in_place=in_place, count=count)
    else:
        blocks = blocks or whole or step_blocks(w.bits)
        words, mu, moved = _plain(w, a, b, omega, within, offset_dtype, blocks, in_place=in_place, count=count)
    merged_offset: jax.Array | None = None
    if here:
        merged_offset = mu
    elif offset != "none":
        # The sum of D over a group is the sum of A's rows times B: exact, and small.
        sum_a = w.group_sum(a.astype(jnp.float32))
        sum_d = jnp.matmul(sum_a, b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        merged_offset = offset_of_sums(w, sum_d, _group_steps(w, words), omega, offset, offset_dtype)
    return dataclasses.replace(w, qweight=words, offset=merged_offset), moved


def _packs(w: QuantizedWeight, a: jax.Array) -> bool:
    """Whether the packed kernel takes this width and rank; the interpreter cannot run it."""
    return can_pack(w.bits, a.shape[-1]) and not interpreted()


def _packed(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    omega: float,
    offset: Offset,
    offset_dtype: Any,
    blocks: AdjustBlocks,
    *,
    in_place: bool = False,
    count: bool = False,
    weight: Any = None,
) -> list[jax.Array]:
    """New words, mu, the counts of moved integers, and the weight in the type ``weight``: either words or weight."""
    from lotaqaf_jax.kernels.adjust.packed import packed_kernel

    n_in, n_out = w.shape
    rank = a.shape[-1]
    values, _ = period_of(w.bits)
    rows = blocks.periods * values
    tiles = -(-n_in // rows)
    padded = _padded(rank)
    # By tile, value of the period and period, as the kernel multiplies it.
    a = jnp.pad(a.astype(jnp.float16), ((0, tiles * rows - n_in), (0, padded - rank)))
    a = a.reshape(tiles, blocks.periods, values, padded).swapaxes(1, 2)
    return launch(
        packed_kernel,
        w.qweight,
        a,
        b.astype(jnp.float16),
        _inverse(w, omega, offset),
        w.scales,
        w.zeros,
        *_thresholds(omega),
        out=[
            *_outputs(w, offset, offset_dtype, (tiles, -(-n_out // blocks.columns)) if count else None, weight is None),
            jax.ShapeDtypeStruct((1, 1) if weight is None else w.shape, weight or jnp.float32),
        ],
        grid=(-(-n_out // blocks.columns), tiles),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        aliases={0: 0} if in_place else None,
        **_rule(w, rank, omega, offset, offset_dtype),
        GROUP=_rows_of_group(w) or 1,
        COUNT=count,
        IN_PLACE=in_place,
        WEIGHT=weight is not None,
        BLOCK_P=blocks.periods,
        BLOCK_N=blocks.columns,
    )


def _plain(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    omega: float,
    offset: Offset,
    offset_dtype: Any,
    blocks: AdjustBlocks,
    *,
    in_place: bool,
    count: bool,
) -> list[jax.Array]:
    """New words, mu, and the counts of moved integers."""
    n_in, n_out = w.shape
    values, words = period_of(w.bits)
    grid = (-(-n_out // blocks.columns), -(-n_in // (blocks.periods * values)))
    return launch(
        _kernels().merge_kernel,
        w.qweight,
        a.astype(jnp.float16),
        b.astype(jnp.float16),
        _inverse(w, omega, offset),
        *_thresholds(omega),
        out=_outputs(w, offset, offset_dtype, grid[::-1] if count else None, True),
        grid=grid,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        aliases={0: 0} if in_place else None,
        **_rule(w, a.shape[-1], omega, offset, offset_dtype),
        WORDS=words,
        GROUP=w.group_size,
        COUNT=count,
        IN_PLACE=in_place,
        BLOCK_P=blocks.periods,
        BLOCK_N=blocks.columns,
    )


def _inverse(w: QuantizedWeight, omega: float, offset: Offset) -> jax.Array:
    return jnp.zeros((1, 1), jnp.float32) if offset == "none" else inverse_rows(w, omega, offset)


def _thresholds(omega: float) -> list[float]:
    """What |D| must pass, and omega in parts."""
    return [float(math.floor(omega)), *[*short_parts(omega), 0.0, 0.0][:3]]


def _outputs(
    w: QuantizedWeight, offset: Offset, offset_dtype: Any, counts: tuple[int, ...] | None, words: bool
) -> list[jax.ShapeDtypeStruct]:
    """Shapes of words, mu and counts; what is not asked for is a single number."""
    mu = (w.groups, w.shape[1]) if words and offset != "none" else (1, 1)
    return [
        jax.ShapeDtypeStruct(w.qweight.shape if words else (1, 1), jnp.int32),
        jax.ShapeDtypeStruct(mu, offset_dtype),
        jax.ShapeDtypeStruct(counts or (1, 1), jnp.int32),
    ]


def _rule(w: QuantizedWeight, rank: int, omega: float, offset: Offset, offset_dtype: Any) -> dict[str, Any]:
    """What both kernels are told of sizes and settings."""
    return _sizes(w) | {
        "rank": rank,
        "BITS": w.bits,
        "VALUES": period_of(w.bits)[0],
        "RANK": _padded(rank),
        "OFFSET": offset != "none",
        "PARTS": len(short_parts(omega)),
        "DROP": 23 - min(jnp.finfo(offset_dtype).nmant, 22),
        "FLUSH": jnp.dtype(offset_dtype) == jnp.float16,
    }


def _padded(rank: int) -> int:
    """As tensor cores take it."""
    return max(16, 1 << (rank - 1).bit_length())


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
    return w.shape[0] if w.group_size == -1 else w.group_size


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
