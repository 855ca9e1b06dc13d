"""The largest value of a matrix; rounding to float8 and transposing in one pass, on a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.float8.blocks import TRANSPOSE, TransposeBlocks
from lotaqaf_jax.kernels.launch import launch

__all__ = ["largest", "transposed"]


def largest(x: jax.Array) -> jax.Array:
    """max|x|, float32; NaN if there is one."""
    from lotaqaf_jax.kernels.float8.triton import largest_kernel

    block, rounds = 4096, 16
    programs = -(-x.size // (block * rounds))
    (parts,) = launch(
        largest_kernel,
        x,
        out=[jax.ShapeDtypeStruct((programs,), jnp.int32)],
        grid=(programs,),
        num_warps=8,
        num_stages=3,
        size=x.size,
        BLOCK=block,
        ROUNDS=rounds,
    )
    return jax.lax.bitcast_convert_type(parts.max(), jnp.float32)


def transposed(x: jax.Array, scale: jax.Array, dtype: Any, *, blocks: TransposeBlocks = TRANSPOSE) -> jax.Array:
    """(x * scale).T in ``dtype``: (rows, columns) -> (columns, rows); ``blocks`` is the tile."""
    from lotaqaf_jax.kernels.float8.triton import transpose_kernel

    rows, columns = x.shape
    (out,) = launch(
        transpose_kernel,
        x,
        scale.reshape(1),
        out=[jax.ShapeDtypeStruct((columns, rows), dtype)],
        grid=(-(-columns // blocks.columns), -(-rows // blocks.rows)),
        num_warps=blocks.warps,
        num_stages=1,
        rows=rows,
        columns=columns,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
    )
    return out
