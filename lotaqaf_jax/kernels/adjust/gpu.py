"""The adjusted weight on a GPU: which kernel runs, with which arguments. Equations: :mod:`lotaqaf_jax.ternary`.

Two kernels make the adjusted weight: the merge (new words and mu, by tiles of whole groups) and dequantise, which is
also that of merged weights. Groups that no tile holds (one group for all rows, odd sizes) and act-order take the merge
in two parts, steps and group sums. Nothing of the size (in, out) is made but the result.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.adjust.blocks import can_pack, merge_blocks, period_of, step_blocks
from lotaqaf_jax.kernels.launch import interpreted, launch
from lotaqaf_jax.quant.weight import QuantizedWeight, trivial_g_idx
from lotaqaf_jax.ternary import Offset, inverse_rows, offset_of_sums, short_parts

__all__ = ["adjusted", "dequantized", "merged"]


def adjusted(
    w: QuantizedWeight, a: jax.Array, b: jax.Array, omega: float, offset: Offset, offset_dtype: Any, dtype: Any
) -> jax.Array:
    """:func:`lotaqaf_jax.ternary.adjusted_weight` rounded to ``dtype``, (in, out).

    Merged words on the way: a quarter of the result at 4 bit, and adapted and merged weights come from one kernel.
    """
    return dequantized(merged(w, a, b, omega, offset, offset_dtype)[0], dtype)


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
    """
    packed = can_pack(w.bits, a.shape[-1]) and not interpreted()
    blocks = None if w.g_idx is not None else merge_blocks(w.bits, w.group_size, packed=packed)
    tiled = blocks is not None
    if blocks is None:
        # A tile without whole groups: its offset is summed up afterwards, for which the old words are needed.
        packed, blocks = False, step_blocks(w.bits)
    n_in, n_out = w.shape
    rank = a.shape[-1]
    values, words = period_of(w.bits)
    grid = (-(-n_out // blocks.columns), -(-n_in // (blocks.periods * values)))
    here = tiled and offset != "none"
    in_place = in_place and (here or offset == "none")
    parts = short_parts(omega)
    new_words, mu, moved = launch(
        _kernels().merge_kernel,
        w.qweight,
        a.astype(jnp.float16),
        b.astype(jnp.float16),
        inverse_rows(w, omega, offset) if here else jnp.zeros((1, 1), jnp.float32),
        float(math.floor(omega)),
        *[*parts, 0.0, 0.0][:3],
        out=[
            jax.ShapeDtypeStruct(w.qweight.shape, jnp.int32),
            jax.ShapeDtypeStruct((w.groups, n_out) if here else (1, 1), offset_dtype),
            jax.ShapeDtypeStruct(grid[::-1] if count else (1, 1), jnp.int32),
        ],
        grid=grid,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        aliases={0: 0} if in_place else None,
        **_sizes(w),
        rank=rank,
        BITS=w.bits,
        VALUES=values,
        WORDS=words,
        RANK=max(16, 1 << (rank - 1).bit_length()),  # as tensor cores take it
        GROUP=w.group_size if tiled else 0,
        OFFSET=here,
        PARTS=len(parts),
        DROP=23 - min(jnp.finfo(offset_dtype).nmant, 22),
        FLUSH=jnp.dtype(offset_dtype) == jnp.float16,
        PACKED=packed,
        COUNT=count,
        IN_PLACE=in_place,
        BLOCK_P=blocks.periods,
        BLOCK_N=blocks.columns,
    )
    merged_offset: jax.Array | None = None
    if here:
        merged_offset = mu
    elif offset != "none":
        # The sum of D over a group is the sum of A's rows times B: exact, and small.
        sum_a = w.group_sum(a.astype(jnp.float32))
        sum_d = jnp.matmul(sum_a, b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        merged_offset = offset_of_sums(w, sum_d, _group_steps(w, new_words), omega, offset, offset_dtype)
    return dataclasses.replace(w, qweight=new_words, offset=merged_offset), moved


def _sizes(w: QuantizedWeight) -> dict[str, Any]:
    """Sizes as constants: what divides them decides how wide loads are, and how values lie in registers."""
    return {"K": w.shape[0], "N": w.shape[1], "words": w.qweight.shape[0], "groups": w.groups}


def dequantized(w: QuantizedWeight, dtype: Any) -> jax.Array:
    """W rounded to ``dtype``, (in, out)."""
    values, words = period_of(w.bits)
    n_in, n_out = w.shape
    periods, columns = 16, 128
    nothing = jnp.zeros((1, 1), jnp.float32)
    (weight,) = launch(
        _kernels().dequantize_kernel,
        w.qweight,
        w.scales,
        w.zeros,
        nothing if w.offset is None else w.offset,
        jnp.zeros((1,), jnp.int32) if w.g_idx is None else w.g_idx,
        out=[jax.ShapeDtypeStruct(w.shape, dtype)],
        grid=(-(-n_out // columns), -(-n_in // (periods * values))),
        num_warps=4,
        num_stages=1,
        **_sizes(w),
        BITS=w.bits,
        VALUES=values,
        WORDS=words,
        GROUP=_rows_of_group(w),
        OFFSET=w.offset is not None,
        BLOCK_P=periods,
        BLOCK_N=columns,
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
