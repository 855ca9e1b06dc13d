"""Sizes that kernels share."""

from __future__ import annotations

__all__ = ["padded"]


def padded(size: int) -> int:
    """The side of a product as tensor cores and Triton's shapes take it: a power of two, 16 at least."""
    return max(16, 1 << (size - 1).bit_length())
