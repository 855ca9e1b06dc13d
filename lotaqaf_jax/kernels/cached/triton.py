"""Triton kernel of attention over a cache: one new token a row, all query heads of one key head in a program."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attention_kernel"]


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, cosine_ptr, sine_ptr, keys_ptr, values_ptr, valid_ptr, layer_ptr, slot_ptr, scale,
    part_ptr, largest_ptr, total_ptr, new_keys_ptr, new_values_ptr,
    PAIRS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr,
    SPLIT: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """ROUNDS blocks of slots of one (row, key head) pair, by the running softmax; with SPLIT > 1 a part of the pair's.

    Fewer, if the new token is in an earlier block: nothing is behind it.
    The first program of a pair rotates the new key, writes it and the new value to their slot, in the caches that were
    passed in, and begins its softmax with them. Programs run in any order, so nobody reads that slot. Compiled without
    contraction, a rotation rounds as written.

    ROWS is SHARED, the query heads of a key head, as tensor cores take it.
    """
    pair = tl.program_id(0)
    row = pair // HEADS
    g = tl.arange(0, ROWS)
    c = tl.arange(0, SIZE)
    head = pair * SHARED + g
    # (x, y) -> (x cos - y sin, y cos + x sin): every number by the cosine, and the other of its pair by the sine or,
    # in the first half, by minus the sine.
    other = (c + SIZE // 2) % SIZE
    angle = row * (SIZE // 2) + c % (SIZE // 2)
    cosine = tl.load(cosine_ptr + angle)
    sine = tl.load(sine_ptr + angle)
    sine = tl.where(c < SIZE // 2, -sine, sine)
    mask = (g < SHARED)[:, None]
    q = tl.load(q_ptr + head[:, None] * SIZE + c[None, :], mask=mask, other=0.0).to(tl.float32)
    q_other = tl.load(q_ptr + head[:, None] * SIZE + other[None, :], mask=mask, other=0.0).to(tl.float32)
    q = (q * cosine[None, :] + q_other * sine[None, :]).to(q_ptr.dtype.element_ty)

    at = (tl.load(layer_ptr).to(tl.int64) * PAIRS + pair) * (SLOTS * SIZE)
    keys_ptr += at
    values_ptr += at
    valid_ptr += row * SLOTS
    new = tl.load(slot_ptr)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, SIZE), tl.float32)
    if tl.program_id(1) == 0:
        k = tl.load(k_ptr + pair * SIZE + c).to(tl.float32)
        k_other = tl.load(k_ptr + pair * SIZE + other).to(tl.float32)
        k = (k * cosine + k_other * sine).to(keys_ptr.dtype.element_ty)
        v = tl.load(v_ptr + pair * SIZE + c)
        tl.store(keys_ptr + new * SIZE + c, k)
        tl.store(values_ptr + new * SIZE + c, v)
        largest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
        total += 1.0
        mixed += v.to(tl.float32)[None, :]

    if INTERPRET:  # which has no product of bfloat16, and no loop over as many rounds as a tensor says
        q = q.to(tl.float32)
    rounds = tl.minimum(ROUNDS, new // BLOCK + 1 - tl.program_id(1) * ROUNDS)
    for i in range(ROUNDS if INTERPRET else rounds):
        slot = (tl.program_id(1) * ROUNDS + i) * BLOCK + tl.arange(0, BLOCK)
        valid = (tl.load(valid_ptr + slot, mask=slot < SLOTS, other=0) != 0) & (slot < new)
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
    tl.store(at, mixed.to(part_ptr.dtype.element_ty), mask=mask)
