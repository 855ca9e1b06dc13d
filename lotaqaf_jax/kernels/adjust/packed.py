"""Triton kernel of the adjusted weight in one pass, for 2, 4 and 8 bit: float16 pairs, two periods in an instruction.

A tile is 64 columns by a few periods, transposed, so that B, the left operand, stays in registers and all of the tile's
rows of A are one right operand: one product, one wait. A comes sorted for that, by tile, value of the period, period.
What lies in a thread then is, for a few columns, all values of pairs of neighbouring periods, beside the words that
hold them; groups have whole pairs. Sums over a group are products with ones, which leave every period its group's sum,
so that mu and the weight follow without anything being moved between threads.

Merged words come out of the same code as the weight, and round as :mod:`.triton` does. Triton's interpreter cannot run
the inline assembly; on a card benchmarks/check_kernels.py holds both to plain JAX, bit for bit.

What was tried and lost on an H200, at 5120 x 13824, group 64, rank 64: a product for each value of the period, columns
in pairs (74 us for the words, against 50), which waits on loads of A between the products; the same transposed (72 us).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lotaqaf_jax.kernels.adjust.triton import affine, short_float, without_steps

__all__ = ["packed_kernel"]


@triton.jit
def _columns(x):
    """Even and odd columns of (rows, columns), (rows, columns/2) each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _together(even, odd):
    """The inverse of :func:`_columns`."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] * 2))


@triton.jit
def _pack(x):
    """(rows, columns) float16 -> (rows, columns/2) words of two neighbours."""
    even, odd = _columns(x)
    return tl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [even, odd], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _unpack(x):
    """The inverse of :func:`_pack`."""
    even, odd = tl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
    )
    return _together(even, odd)


@triton.constexpr_function
def _step_assembly(shift, bits, count):
    """PTX of :func:`_take_step`. $0 x, $1 sum_d, $2 sum_t, then moved if ``count``; the same as inputs; d; limit."""
    twice = 0x00010001
    field = (((1 << bits) - 1) << shift) * twice
    unit = (0x3C00 + (shift << 10)) * twice  # 2**shift, and its negative and inverse, as two float16 in a word
    negative = unit | 0x8000 * twice
    inverse = (0x3C00 - (shift << 10)) * twice
    x, sum_d, sum_t, moved, d, limit = (f"${i}" for i in ((4, 5, 6, 7, 8, 9) if count else (3, 4, 5, 0, 6, 7)))
    count_moved = f"abs.f16x2 m, m; fma.rn.f16x2 $3, m, part, {moved};" if count else ""
    return f"""{{
        .reg .b32 u, v, m, k, base, top, one, minus, up, down, part;
        mov.b32 base, 0x64006400; mov.b32 one, 0x3C003C00; mov.b32 minus, 0xBC00BC00;
        mov.b32 top, {0x6400 * twice | field}; mov.b32 up, {unit}; mov.b32 down, {negative}; mov.b32 part, {inverse};
        fma.rn.sat.f16x2 u, {d}, one, {limit};
        fma.rn.sat.f16x2 v, {d}, minus, {limit};
        lop3.b32 m, {x}, {field}, base, 0xEA;
        fma.rn.f16x2 k, u, up, m;
        fma.rn.f16x2 k, v, down, k;
        max.f16x2 k, k, base;
        min.f16x2 k, k, top;
        sub.f16x2 m, k, m;
        lop3.b32 $0, {x}, k, {field}, 0xD8;
        add.f16x2 $1, {sum_d}, {d};
        fma.rn.f16x2 $2, m, part, {sum_t};
        {count_moved}
    }}"""


@triton.jit
def _take_step(x, sum_d, sum_t, moved, d, limit, SHIFT: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Add the steps of one value of every period, two periods in one instruction.

    Every operand holds two neighbouring periods in a word: ``x`` a byte of both, of which the BITS from SHIFT on are
    the value q; the others a float16 of each. As a float16, 1024 + 2**SHIFT * q has q's bits where the byte has them:

        u = sat(D - limit),  v = sat(-D - limit)         1 where D > limit, where D < -limit; sat clips to [0, 1]
        k = clip(m + 2**SHIFT * (u - v), 1024, 1024 + 2**SHIFT * (2**BITS - 1)),   m = 1024 + 2**SHIFT * q

    so that T = (k - m) / 2**SHIFT with the boundary rule, and the bits of k are those of the moved value.
    ``limit`` holds -floor(omega). Every number is an integer of at most 2048, exact in float16.
    """
    asm: tl.constexpr = _step_assembly(SHIFT, BITS, COUNT)
    if COUNT:
        x, sum_d, sum_t, moved = tl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r,r,r,r,r,r", [x, sum_d, sum_t, moved, d, limit],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        x, sum_d, sum_t = tl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,r,r,r,r,r", [x, sum_d, sum_t, d, limit],
            dtype=(tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    return x, sum_d, sum_t, moved


@triton.jit
def _operand(b):
    """``b`` itself. Triton keeps a product's left operand in registers if something lies between it and its load."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _value(d, j: tl.constexpr, VALUES: tl.constexpr):
    """Value j of (columns, pairs of periods, VALUES)."""
    even, odd = tl.split(tl.reshape(d, (d.shape[0], d.shape[1], VALUES // 2, 2)))
    d = even if j % 2 == 0 else odd
    return _value(d, j // 2, VALUES // 2) if VALUES > 2 else tl.reshape(d, (d.shape[0], d.shape[1]))


@triton.jit
def _byte(x0, x1, x2, x3, i: tl.constexpr):
    """The i-th of four."""
    return x0 if i == 0 else (x1 if i == 1 else (x2 if i == 2 else x3))


@triton.jit
def packed_kernel(
    words_ptr, a_ptr, b_ptr, inverse_ptr, scales_ptr, zeros_ptr,
    limit, part0, part1, part2,
    new_words_ptr, offset_ptr, moved_ptr, weight_ptr,
    K: tl.constexpr, N: tl.constexpr, words: tl.constexpr, groups: tl.constexpr, rank: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, PARTS: tl.constexpr, DROP: tl.constexpr, FLUSH: tl.constexpr,
    COUNT: tl.constexpr, IN_PLACE: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile: with WEIGHT its adjusted weight, else its merged words and, with OFFSET, its mu.

    With OFFSET the tile holds whole groups of GROUP consecutive rows; otherwise a group may be any multiple of two
    periods. ``a`` is (tiles, VALUES, BLOCK_P, RANK).
    """
    if IN_PLACE:
        new_words_ptr = words_ptr
    tile = tl.program_id(1)
    period = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    r = tl.arange(0, RANK)
    row = tile * (BLOCK_P * VALUES) + tl.arange(0, BLOCK_P * VALUES)
    a = tl.load(a_ptr + row[None, :] * RANK + r[:, None])
    b = tl.load(b_ptr + r[None, :] * N + n[:, None], mask=(r < rank)[None, :] & mask_n[:, None], other=0.0)
    at = period.to(tl.int64)[None, :] * N + n[:, None]
    there = (period < words)[None, :] & mask_n[:, None]
    w = tl.load(words_ptr + at, mask=there, other=0).to(tl.uint32, bitcast=True)
    d = _pack(tl.dot(_operand(b), a, out_dtype=tl.float16))
    d = tl.permute(tl.reshape(d, (BLOCK_N, VALUES, BLOCK_P // 2)), (0, 2, 1))
    even, odd = _columns(w)
    # Byte 0, 1, 2 and 3 of the words of both periods.
    first = (even & 0xFFFF) | (odd << 16)
    second = (even >> 16) | (odd & 0xFFFF0000)
    x0, x1 = first & 0x00FF00FF, (first >> 8) & 0x00FF00FF
    x2, x3 = second & 0x00FF00FF, (second >> 8) & 0x00FF00FF
    sum_d = tl.zeros((BLOCK_N, BLOCK_P // 2), tl.uint32)
    sum_t, moved = sum_d, sum_d
    limits = _pack(tl.zeros((BLOCK_N, BLOCK_P), tl.float16) - limit.to(tl.float16))
    for j in tl.static_range(VALUES):
        dj = _value(d, j, VALUES)
        if j * BITS // 8 == 0:
            x0, sum_d, sum_t, moved = _take_step(x0, sum_d, sum_t, moved, dj, limits, j * BITS % 8, BITS, COUNT)
        elif j * BITS // 8 == 1:
            x1, sum_d, sum_t, moved = _take_step(x1, sum_d, sum_t, moved, dj, limits, j * BITS % 8, BITS, COUNT)
        elif j * BITS // 8 == 2:
            x2, sum_d, sum_t, moved = _take_step(x2, sum_d, sum_t, moved, dj, limits, j * BITS % 8, BITS, COUNT)
        else:
            x3, sum_d, sum_t, moved = _take_step(x3, sum_d, sum_t, moved, dj, limits, j * BITS % 8, BITS, COUNT)
    if not WEIGHT:
        first = x0 | (x1 << 8)
        second = x2 | (x3 << 8)
        w = _together((first & 0xFFFF) | (second << 16), (first >> 16) | (second & 0xFFFF0000))
        tl.store(new_words_ptr + at, w.to(tl.int32, bitcast=True), mask=there)
    if COUNT:
        count = tl.sum(tl.sum(_unpack(moved).to(tl.float32), axis=1), axis=0).to(tl.int32)
        tl.store(moved_ptr + tile * tl.num_programs(0) + tl.program_id(0), count)
    group = period * VALUES // GROUP
    at = group[None, :] * N + n[:, None]
    there = (group < groups)[None, :] & mask_n[:, None]
    if OFFSET or WEIGHT:
        ones = (group[:, None] == group[None, :]).to(tl.float16)
        total = tl.dot(_unpack(sum_d), ones)
        mu = total
    if OFFSET:
        taken = tl.dot(_unpack(sum_t), ones)
        inverse = tl.load(inverse_ptr + group, mask=group < groups, other=0.0)
        mu = without_steps(total, taken, part0, part1, part2, PARTS) * inverse[None, :]
        mu = short_float(mu, DROP, FLUSH)
        if not WEIGHT:
            leads = (period * VALUES % GROUP == 0)[None, :]
            tl.store(offset_ptr + at, mu.to(offset_ptr.dtype.element_ty), mask=there & leads)
    if WEIGHT:
        # The condition always holds: it ties scales and zeros to where the products' sums lie.
        s = tl.load(scales_ptr + at, mask=there, other=0.0).to(tl.float32)
        z = tl.load(zeros_ptr + at, mask=there, other=0).to(tl.float32)
        s, _ = _columns(tl.where(total > -1e30, s, 0.0))
        z, _ = _columns(tl.where(total > -1e30, z, 0.0))
        mu, _ = _columns(mu)
        kind: tl.constexpr = weight_ptr.dtype.element_ty
        for j in tl.static_range(VALUES):
            q = _byte(x0, x1, x2, x3, j * BITS // 8) >> (j * BITS % 8)
            even = affine(q & (2**BITS - 1), z, s, mu, OFFSET)
            odd = affine((q >> 16) & (2**BITS - 1), z, s, mu, OFFSET)
            weight = _together(even.to(kind), odd.to(kind))
            row = period * VALUES + j
            at = row.to(tl.int64)[None, :] * N + n[:, None]
            tl.store(weight_ptr + at, weight, mask=(row < K)[None, :] & mask_n[:, None])
