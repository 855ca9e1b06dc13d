"""Triton kernel of a residual sum and the norm that follows."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_norm_kernel"]


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 in 16 bits, rounded to the nearest."""
    if INTERPRET and dtype == tl.bfloat16:  # which would cut the other bits off
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def add_norm_kernel(
    x_ptr, update_ptr, weight_ptr, layer_ptr, eps,
    sum_ptr, y_ptr,
    LAYERS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One row: x plus the sum of PARTS updates, and its norm; BLOCK is SIZE as a power of two.

    What 16 bits round is rounded where plain JAX rounds it, and multiplied in float32, where such products are exact.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    c = tl.arange(0, BLOCK)
    there = c < SIZE
    at = tl.program_id(0) * SIZE + c
    layer = tl.minimum(tl.load(layer_ptr), LAYERS - 1).to(tl.int64)
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + at, mask=there, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        update += tl.load(update_ptr + part * (ROWS * SIZE) + at, mask=there, other=0.0)
    weight = tl.load(weight_ptr + layer * SIZE + c, mask=there, other=0.0)
    update = _rounded(update, dtype, INTERPRET).to(tl.float32)
    x = _rounded(x + update, dtype, INTERPRET)
    tl.store(sum_ptr + at, x, mask=there)
    x = x.to(tl.float32)
    normed = _rounded(x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps), dtype, INTERPRET).to(tl.float32)
    weight = _rounded(weight.to(tl.float32), dtype, INTERPRET).to(tl.float32)
    tl.store(y_ptr + at, _rounded(weight * normed, dtype, INTERPRET), mask=there)
