"""Triton kernels of the adapters' gradients, from the gradient of the weight, which each of them reads once.

    P = (h * s * dW') @ B.T   (in, rank),      Q = A.T @ (h * s * dW') + m.T @ (s * dW')   (rank, out)

with h = 1 or, with WINDOW, :func:`lotaqaf_jax.ternary.window` of a tile of D = A @ B, and m, equal in all rows of a
group, the offset's part (see :mod:`.gpu`). What P sums over, the columns, have a scale each, so that s * dW' is made, a
tile at a time, and never written. What Q sums over, the rows of a group, have one: the sum of a tile is multiplied
instead. A program adds up a part of a product, and XLA the parts, in the same order in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["left_kernel", "right_kernel"]


@triton.jit
def _window(d, omega, WIDTH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr):
    """h(|D|), see :func:`lotaqaf_jax.ternary.window`."""
    size = tl.abs(d)
    distance = (size - omega) / (WIDTH * omega)
    return tl.maximum(tl.exp(-distance * distance), tl.where(size > omega, ABOVE, BELOW))


@triton.jit
def left_kernel(
    dweight_ptr, scales_ptr, a_ptr, b_ptr, omega_ptr,
    p_ptr,
    K: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, rank: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """ROWS rows of P, which lie in one group or hold whole groups, over ROUNDS times COLUMNS columns."""
    PARTS: tl.constexpr = max(1, ROWS // GROUP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(0) * ROWS + tl.arange(0, PARTS) * (ROWS // PARTS)
    r = tl.arange(0, RANK)
    # Transposed (rank, rows), so that what is made here, s * dW', is the right operand: Hopper's tensor cores read a
    # left one from registers while the program goes on, and Triton before 3.7 (its issue 9433) lets the next round
    # write them meanwhile.
    total = tl.zeros((RANK, ROWS), tl.float32)
    if WINDOW:
        place = a_ptr + row[:, None] * rank + r[None, :]
        a = tl.load(place, mask=(r < rank)[None, :] & (row < K)[:, None], other=0.0)
        omega = tl.load(omega_ptr)
        if INTERPRET:
            a = a.to(tl.float32)
    for i in range(ROUNDS):
        n = (tl.program_id(1) * ROUNDS + i) * COLUMNS + tl.arange(0, COLUMNS)
        b = tl.load(b_ptr + r[:, None] * N + n[None, :], mask=(r < rank)[:, None] & (n < N)[None, :], other=0.0)
        at = row.to(tl.int64)[:, None] * N + n[None, :]
        dweight = tl.load(dweight_ptr + at, mask=(row < K)[:, None] & (n < N)[None, :], other=0.0)
        at = (start // GROUP)[:, None] * N + n[None, :]
        s = tl.load(scales_ptr + at, mask=(start < K)[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if PARTS == 1:
            scaled = dweight.to(tl.float32) * s
        else:
            scaled = tl.reshape(dweight.to(tl.float32), (PARTS, ROWS // PARTS, COLUMNS)) * s[:, None, :]
            scaled = tl.reshape(scaled, (ROWS, COLUMNS))
        kind: tl.constexpr = b.dtype
        if INTERPRET:  # which has no product of bfloat16
            b = b.to(tl.float32)
        if WINDOW:
            # Whole numbers, which TF32 holds.
            d = tl.dot(a, b, input_precision="tf32")
            scaled *= _window(d, omega, WIDTH, BELOW, ABOVE)
        scaled = scaled.to(kind).to(b.dtype)
        total = tl.dot(b, tl.trans(scaled), total, input_precision="tf32x3")
    at = p_ptr + (tl.program_id(1) * K + row)[None, :] * rank + r[:, None]
    tl.store(at, total, mask=(row < K)[None, :] & (r < rank)[:, None])


@triton.jit
def right_kernel(
    dweight_ptr, scales_ptr, a_ptr, b_ptr, mean_ptr, omega_ptr,
    q_ptr,
    K: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, rank: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr,
    MEAN: tl.constexpr,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of Q over ROUNDS times ROWS rows of one group; ``mean`` holds m, a row for every group."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    if WINDOW:
        b = tl.load(b_ptr + r[:, None] * N + n[None, :], mask=(r < rank)[:, None] & (n < N)[None, :], other=0.0)
        omega = tl.load(omega_ptr)
        if INTERPRET:
            b = b.to(tl.float32)
    for i in range(ROUNDS):
        first = (tl.program_id(1) * ROUNDS + i) * ROWS
        row = first + tl.arange(0, ROWS)
        group = first // GROUP
        # Transposed (rank, rows), as the product wants it
        a = tl.load(a_ptr + row[None, :] * rank + r[:, None], mask=(r < rank)[:, None] & (row < K)[None, :], other=0.0)
        at = row.to(tl.int64)[:, None] * N + n[None, :]
        dweight = tl.load(dweight_ptr + at, mask=(row < K)[:, None] & (n < N)[None, :], other=0.0)
        s = tl.load(scales_ptr + group * N + n, mask=(n < N) & (first < K), other=0.0).to(tl.float32)
        kind: tl.constexpr = a.dtype
        if INTERPRET:
            dweight, a = dweight.to(tl.float32), a.to(tl.float32)
        seen = dweight
        if WINDOW:
            d = tl.dot(tl.trans(a), b, input_precision="tf32")
            seen = (dweight.to(tl.float32) * _window(d, omega, WIDTH, BELOW, ABOVE)).to(kind).to(a.dtype)
        part = tl.dot(a, seen, input_precision="tf32x3")
        if MEAN:
            # A product of its own: a sum of A and m in 16 bits would round m away.
            m = tl.load(mean_ptr + group * rank + r, mask=(r < rank) & (first < K), other=0.0).to(a.dtype)
            part = tl.dot(tl.broadcast_to(m[:, None], (RANK, ROWS)), dweight, part, input_precision="tf32x3")
        total += part * s[None, :]
    at = q_ptr + (tl.program_id(1) * rank + r)[:, None] * N + n[None, :]
    tl.store(at, total, mask=(r < rank)[:, None] & (n < N)[None, :])
