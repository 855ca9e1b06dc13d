"""Triton kernels that project the gradient of a weight onto its adapters, in one reading each.

    dD = s * dW' + c * groupmean(s * dW'),   dA = dD @ B.T,   dB = A.T @ dD

dD exists only a tile at a time. A tile holds whole groups of consecutive rows, so that the mean needs no other tile. The
adapters' values are exact in any type; dD keeps the 10 bits of TF32, or with PRECISION "ieee" all of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["columns_kernel", "rows_kernel"]


@triton.jit
def _tile(
    dweight_ptr, scales_ptr, share_ptr, tile, n, K, N, groups,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dD (BLOCK_K, BLOCK_N), float32; 0 outside of the matrix."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    row = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = n < N
    at = dweight_ptr + row.to(tl.int64)[:, None] * N + n[None, :]
    dd = tl.load(at, mask=(row < K)[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    group = tile * GROUPS + tl.arange(0, GROUPS)
    at = scales_ptr + group[:, None] * N + n[None, :]
    scales = tl.load(at, mask=(group < groups)[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    dd = tl.reshape(dd, (GROUPS, GROUP, BLOCK_N)) * scales[:, None, :]
    if OFFSET:
        share = tl.load(share_ptr + group, mask=group < groups, other=0.0)
        dd = dd + (tl.sum(dd, axis=1) * share[:, None])[:, None, :]
        dd = tl.where((tl.reshape(row, (GROUPS, GROUP)) < K)[:, :, None], dd, 0.0)
    return tl.reshape(dd, (BLOCK_K, BLOCK_N))


@triton.jit
def rows_kernel(
    dweight_ptr, scales_ptr, share_ptr, b_ptr,
    K, N, groups, rank,
    da_ptr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    TILES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Part of dA: the rows of one tile, over TILES tiles of columns. Parts lie one after the other in ``da``."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    total = tl.zeros((BLOCK_K, RANK), tl.float32)
    for i in tl.range(0, TILES):
        n = (part * TILES + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        dd = _tile(dweight_ptr, scales_ptr, share_ptr, tile, n, K, N, groups, GROUP, OFFSET, BLOCK_K, BLOCK_N)
        mask = (r < rank)[:, None] & (n < N)[None, :]
        b = tl.load(b_ptr + r[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.dot(dd, tl.trans(b), total, input_precision=PRECISION)
    row = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    at = da_ptr + (part * K + row).to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(at, total, mask=(row < K)[:, None] & (r < rank)[None, :])


@triton.jit
def columns_kernel(
    dweight_ptr, scales_ptr, share_ptr, a_ptr,
    K, N, groups, rank,
    db_ptr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    TILES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Part of dB: one tile of columns, over TILES tiles of rows. Parts lie one after the other in ``db``."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK, BLOCK_N), tl.float32)
    for i in tl.range(0, TILES):
        tile = part * TILES + i
        dd = _tile(dweight_ptr, scales_ptr, share_ptr, tile, n, K, N, groups, GROUP, OFFSET, BLOCK_K, BLOCK_N)
        row = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (row < K)[:, None] & (r < rank)[None, :]
        a = tl.load(a_ptr + row[:, None] * rank + r[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.dot(tl.trans(a), dd, total, input_precision=PRECISION)
    at = db_ptr + (part * rank + r).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, total, mask=(r < rank)[:, None] & (n < N)[None, :])
