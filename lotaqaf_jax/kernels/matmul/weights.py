"""The weights of one launch of the packed matmul, of which a program works on one: what its two kernels share.

Up to three weights have their blocks of columns one behind the other: those of the first end at END0, of the second at
END1, of the third at END2. Where there are fewer, ends are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["arrays_of_weight", "of_weight", "plus_bias"]


@triton.jit
def of_weight(block, first, second, third, END0: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr):
    """What belongs to the weight in whose columns ``block`` lies."""
    chosen = first
    if END1 > END0:
        chosen = tl.where(block >= END0, second, chosen)
    if END2 > END1:
        chosen = tl.where(block >= END1, third, chosen)
    return chosen


@triton.jit
def arrays_of_weight(
    block,
    words0_ptr, scales0_ptr, zeros0_ptr, offset0_ptr, bias0_ptr,
    words1_ptr, scales1_ptr, zeros1_ptr, offset1_ptr, bias1_ptr,
    words2_ptr, scales2_ptr, zeros2_ptr, offset2_ptr, bias2_ptr,
    layer_ptr, N, words, groups,
    END0: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """Words, scales, zeros, offset and bias of that weight of N columns; with LAYER those of one layer of its stack."""
    words_ptr = of_weight(block, words0_ptr, words1_ptr, words2_ptr, END0, END1, END2)
    scales_ptr = of_weight(block, scales0_ptr, scales1_ptr, scales2_ptr, END0, END1, END2)
    zeros_ptr = of_weight(block, zeros0_ptr, zeros1_ptr, zeros2_ptr, END0, END1, END2)
    offset_ptr = of_weight(block, offset0_ptr, offset1_ptr, offset2_ptr, END0, END1, END2)
    bias_ptr = of_weight(block, bias0_ptr, bias1_ptr, bias2_ptr, END0, END1, END2)
    if LAYER:
        layer = tl.load(layer_ptr).to(tl.int64)
        words_ptr += layer * words * N
        scales_ptr += layer * groups * N
        zeros_ptr += layer * groups * N
        offset_ptr += layer * groups * N
        bias_ptr += layer * N
    return words_ptr, scales_ptr, zeros_ptr, offset_ptr, bias_ptr


@triton.jit
def plus_bias(y, bias, dtype: tl.constexpr):
    """y + bias in float32, each rounded to ``dtype`` before, as where the bias is an operation of its own."""
    return y.to(dtype).to(tl.float32) + bias.to(tl.float32).to(dtype).to(tl.float32)
