"""Triton kernel of attention over a cache: one new token a row, all query heads of one key head in a program."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attention_kernel"]


@triton.jit
def attention_kernel(
    q_ptr, keys_ptr, values_ptr, valid_ptr, layer_ptr, scale,
    part_ptr, largest_ptr, total_ptr,
    PAIRS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr,
    SPLIT: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """ROUNDS blocks of slots of one (row, key head) pair, by the running softmax; with SPLIT > 1 a part of the pair's.

    ROWS is SHARED, the query heads of a key head, as tensor cores take it.
    """
    pair = tl.program_id(0)
    g = tl.arange(0, ROWS)
    c = tl.arange(0, SIZE)
    head = pair * SHARED + g
    q = tl.load(q_ptr + head[:, None] * SIZE + c[None, :], mask=(g < SHARED)[:, None], other=0.0)
    at = (tl.load(layer_ptr).to(tl.int64) * PAIRS + pair) * (SLOTS * SIZE)
    keys_ptr += at
    values_ptr += at
    valid_ptr += pair // HEADS * SLOTS
    if INTERPRET:  # which has no product of bfloat16
        q = q.to(tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, SIZE), tl.float32)
    for i in range(ROUNDS):
        slot = (tl.program_id(1) * ROUNDS + i) * BLOCK + tl.arange(0, BLOCK)
        valid = tl.load(valid_ptr + slot, mask=slot < SLOTS, other=0) != 0
        k = tl.load(keys_ptr + slot[:, None] * SIZE + c[None, :], mask=valid[:, None], other=0.0)
        v = tl.load(values_ptr + slot[:, None] * SIZE + c[None, :], mask=valid[:, None], other=0.0)
        if INTERPRET:
            k, v = k.to(tl.float32), v.to(tl.float32)
        score = tl.where(valid[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(score, axis=1))
        # Until the first valid slot there is no largest score, and nothing to be taken from it.
        zero = tl.where(largest == float("-inf"), 0.0, largest)
        weight = tl.exp(score - zero[:, None])
        fade = tl.exp(before - zero)
        total = total * fade + tl.sum(weight, axis=1)
        mixed = tl.dot(weight.to(v.dtype), v, mixed * fade[:, None])
    out = tl.program_id(1) * (PAIRS * SHARED) + head
    if SPLIT == 1:
        mixed = mixed / total[:, None]
    else:
        tl.store(largest_ptr + out, largest, mask=g < SHARED)
        tl.store(total_ptr + out, total, mask=g < SHARED)
    at = part_ptr + out[:, None] * SIZE + c[None, :]
    tl.store(at, mixed.to(part_ptr.dtype.element_ty), mask=(g < SHARED)[:, None])
