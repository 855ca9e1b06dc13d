"""What Triton kernels share about the words of a period of the bitstream; importing it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["neighbours"]


@triton.jit
def neighbours(w0, w1, w2, first: tl.constexpr):
    """Word ``first`` of up to three, and the one after it, into which a value may reach; behind the last, itself."""
    if first == 0:
        return w0, w1
    elif first == 1:
        return w1, w2
    else:
        return w2, w2
