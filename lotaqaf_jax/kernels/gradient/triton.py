"""Triton kernel of the gradient of D: dD = s * dW' + c * groupmean(s * dW'), one reading and one writing."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["step_gradient_kernel"]


@triton.jit
def step_gradient_kernel(
    dweight_ptr, scales_ptr, share_ptr,
    dd_ptr,
    K: tl.constexpr, N: tl.constexpr, groups: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of GROUPS whole groups of GROUP consecutive rows; ``share`` is c over the rows of each group.

    In place: ``dd_ptr`` is not used.
    """
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    row = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, :, None] * N + n[None, None, :]
    mask = (row < K)[:, :, None] & (n < N)[None, None, :]
    dd = tl.load(dweight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scales = tl.load(
        scales_ptr + group[:, None] * N + n[None, :], mask=(group < groups)[:, None] & (n < N)[None, :], other=0.0
    )
    dd = dd * scales.to(tl.float32)[:, None, :]
    if OFFSET:
        share = tl.load(share_ptr + group, mask=group < groups, other=0.0)
        dd = dd + (tl.sum(dd, axis=1) * share[:, None])[:, None, :]
    tl.store(dweight_ptr + at, dd.to(dweight_ptr.dtype.element_ty), mask=mask)
