"""The gradients of the adapters on a GPU: which kernel runs, with which arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.launch import launch
from lotaqaf_jax.quant.weight import QuantizedWeight
from lotaqaf_jax.ternary import Offset, offset_scale

__all__ = ["fits_tiles", "projected"]


@dataclasses.dataclass(frozen=True)
class ProjectBlocks:
    """Tile of dD, and about how many programs to start by cutting the long sums into parts."""

    rows: int = 64
    columns: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 528


def fits_tiles(w: QuantizedWeight) -> bool:
    """Whether tiles can hold whole groups: consecutive rows, 16, 32, 64 or 128 of them."""
    return w.g_idx is None and w.group_size in (16, 32, 64, 128)


def projected(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    dweight: jax.Array,
    *,
    omega: float,
    offset: Offset,
    blocks: ProjectBlocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`lotaqaf_jax.ternary.adapter_gradients` for weights that fit tiles (:func:`fits_tiles`).

    Args:
        w: the quantised weight (in, out).
        a: (in, rank).
        b: (rank, out).
        dweight: dL/dW', (in, out): float32, whose bits are all used, or a 16-bit type.
        omega: threshold.
        offset: offset rule.
        blocks: tile sizes.

    Returns:
        dA (in, rank) and dB (rank, out), float32. Parts of the sums are added in a fixed order.
    """
    from lotaqaf_jax.kernels.project import triton as kernels

    blocks = ProjectBlocks() if blocks is None else blocks
    n_in, n_out = w.shape
    rank = a.shape[-1]
    rows = max(blocks.rows, w.group_size)
    row_tiles, column_tiles = -(-n_in // rows), -(-n_out // blocks.columns)
    share = (offset_scale(omega, offset) / w.group_rows()).astype(jnp.float32)
    common: dict[str, Any] = {
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        "fuse": True,
        "GROUP": w.group_size,
        "OFFSET": offset != "none",
        "RANK": max(16, 1 << (rank - 1).bit_length()),
        "PRECISION": "ieee" if dweight.dtype == jnp.float32 else "tf32",
        "BLOCK_K": rows,
        "BLOCK_N": blocks.columns,
    }

    def parts(tiles: int, others: int) -> tuple[int, int]:
        """(parts, tiles of a part) for a sum over ``tiles`` tiles beside ``others`` independent ones."""
        each = max(1, -(-tiles * others // blocks.programs))
        return -(-tiles // each), each

    count, each = parts(column_tiles, row_tiles)
    (da,) = launch(
        kernels.rows_kernel,
        dweight,
        w.scales,
        share,
        b.astype(jnp.float16),
        n_in,
        n_out,
        w.groups,
        rank,
        out=[jax.ShapeDtypeStruct((count, n_in, rank), jnp.float32)],
        grid=(row_tiles, count),
        TILES=each,
        **common,
    )
    count, each = parts(row_tiles, column_tiles)
    (db,) = launch(
        kernels.columns_kernel,
        dweight,
        w.scales,
        share,
        a.astype(jnp.float16),
        n_in,
        n_out,
        w.groups,
        rank,
        out=[jax.ShapeDtypeStruct((count, rank, n_out), jnp.float32)],
        grid=(column_tiles, count),
        TILES=each,
        **common,
    )
    return da.sum(axis=0), db.sum(axis=0)
