"""Triton kernels: the largest value of a matrix; a matrix scaled, rounded to float8 and transposed."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["largest_kernel", "transpose_kernel"]


@triton.jit
def largest_kernel(x_ptr, largest_ptr, size: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """max|x| of ROUNDS blocks, by the bits of float32 without their sign, which makes NaN the largest of all."""
    largest = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * (ROUNDS * BLOCK)
    for i in range(ROUNDS):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(largest_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def transpose_kernel(
    x_ptr, scale_ptr,
    out_ptr,
    rows: tl.constexpr, columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile: out[c, r] = x[r, c] * scale."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    x = (x.to(tl.float32) * tl.load(scale_ptr)).to(out_ptr.dtype.element_ty)
    at = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + at, tl.trans(x), mask=(column < columns)[:, None] & (row < rows)[None, :])
