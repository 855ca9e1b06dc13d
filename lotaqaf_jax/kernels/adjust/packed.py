"""Triton kernel of the adjusted weight in one pass: float16 pairs, two periods in an instruction.

A tile is 64 columns by a few periods, transposed, so that B, the left operand, stays in registers and all of the tile's
rows of A are one right operand: one product, one wait. A comes sorted for that, by tile, value of the period, period.
What lies in a thread then is, for a few columns, all values of pairs of neighbouring periods, beside the words that
hold them; groups have whole pairs. Sums over a group are products with ones, which leave every period its group's sum,
so that mu and the weight follow without anything being moved between threads.

A period is a word. At 3 bit it is 24 bits, which hold 8 values, so that two pairs have three words and share the middle
one: both read it, and to put merged words together threads exchange halves.

Merged words come out of the same code as the weight, and round as :mod:`.triton` does. Its instructions on pairs are
inline assembly, for which Triton's interpreter computes the same halves apart (INTERPRET); on a card
benchmarks/check_kernels.py holds the assembly to plain JAX, bit for bit.

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
def _pack(x, INTERPRET: tl.constexpr):
    """(rows, columns) float16 -> (rows, columns/2) words of two neighbours."""
    even, odd = _columns(x)
    if INTERPRET:
        even = even.to(tl.uint16, bitcast=True).to(tl.uint32)
        word = even | (odd.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        word = tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [even, odd], dtype=tl.uint32, is_pure=True, pack=1
        )
    return word


@triton.jit
def _unpack(x, INTERPRET: tl.constexpr):
    """The inverse of :func:`_pack`."""
    if INTERPRET:
        even = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        odd = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
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
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low), high).to(x.dtype)


@triton.jit
def _take_step_apart(x, sum_d, sum_t, moved, d, limit, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """:func:`_take_step` for the interpreter: the assembly line by line, on the halves of words."""
    field: tl.constexpr = ((2**BITS - 1) << SHIFT) * 0x00010001
    m = _unpack((x & field) | 0x64006400, True)
    d = _unpack(d, True)
    limit = _unpack(limit, True)
    u = _clip(d + limit, 0.0, 1.0)
    v = _clip(limit - d, 0.0, 1.0)
    k = _clip(m + u * 2.0**SHIFT - v * 2.0**SHIFT, 1024.0, 1024.0 + 2.0**SHIFT * (2**BITS - 1))
    m = (k - m) * 0.5**SHIFT
    x = (x & (0xFFFFFFFF - field)) | (_pack(k, True) & field)
    sum_d = _pack(_unpack(sum_d, True) + d, True)
    sum_t = _pack(_unpack(sum_t, True) + m, True)
    moved = _pack(_unpack(moved, True) + tl.abs(m), True)
    return x, sum_d, sum_t, moved


@triton.jit
def _take_step(
    x, sum_d, sum_t, moved, d, limit,
    SHIFT: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the steps of one value of every period, two periods in one instruction.

    Every operand holds two neighbouring periods in a word: ``x`` a part of both, of which the BITS from SHIFT on are
    the value q; the others a float16 of each. As a float16, 1024 + 2**SHIFT * q has q's bits where the part has them:

        u = sat(D - limit),  v = sat(-D - limit)         1 where D > limit, where D < -limit; sat clips to [0, 1]
        k = clip(m + 2**SHIFT * (u - v), 1024, 1024 + 2**SHIFT * (2**BITS - 1)),   m = 1024 + 2**SHIFT * q

    so that T = (k - m) / 2**SHIFT with the boundary rule, and the bits of k are those of the moved value.
    ``limit`` holds -floor(omega). Every number is an integer of at most 2048, exact in float16.
    """
    if INTERPRET:
        x, sum_d, sum_t, moved = _take_step_apart(x, sum_d, sum_t, moved, d, limit, SHIFT, BITS)
    elif COUNT:
        x, sum_d, sum_t, moved = tl.inline_asm_elementwise(
            _step_assembly(SHIFT, BITS, True), "=&r,=&r,=&r,=&r,r,r,r,r,r,r", [x, sum_d, sum_t, moved, d, limit],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        x, sum_d, sum_t = tl.inline_asm_elementwise(
            _step_assembly(SHIFT, BITS, False), "=&r,=&r,=&r,r,r,r,r,r", [x, sum_d, sum_t, d, limit],
            dtype=(tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    return x, sum_d, sum_t, moved


@triton.jit
def _operand(b, INTERPRET: tl.constexpr):
    """``b`` itself. Triton keeps a product's left operand in registers if something lies between it and its load."""
    if not INTERPRET:
        b = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b], dtype=tl.float16, is_pure=True, pack=2)
    return b


@triton.jit
def _value(d, j: tl.constexpr, VALUES: tl.constexpr):
    """Value j of (columns, pairs of periods, VALUES)."""
    even, odd = tl.split(tl.reshape(d, (d.shape[0], d.shape[1], VALUES // 2, 2)))
    d = even if j % 2 == 0 else odd
    return _value(d, j // 2, VALUES // 2) if VALUES > 2 else tl.reshape(d, (d.shape[0], d.shape[1]))


@triton.jit
def _parts(even, odd, later, BITS: tl.constexpr):
    """Parts 0, 1, 2 and 3 of two neighbouring periods, in the halves of a word, from their words ``even`` and ``odd``.

    A part is a byte, and at 3 bit three values, the last one two; there is no fourth. There the pair's 48 bits begin at
    bit 0 of the first word, or, the ``later`` of the two pairs in three words, at bit 16.
    """
    if BITS == 3:
        # 24 bits of either period, and others above.
        first = tl.where(later, (even >> 16) | (odd << 16), even)
        second = (first >> 24) | (tl.where(later, odd >> 16, odd) << 8)
        x0 = ((first & 0xFFFF) | (second << 16)) & 0x01FF01FF
        x1 = ((first >> 9) & 0x01FF) | ((second << 7) & 0x01FF0000)
        x2 = (((first >> 16) | (second & 0xFFFF0000)) >> 2) & 0x003F003F
        x3 = x2
    else:
        first = (even & 0xFFFF) | (odd << 16)
        second = (even >> 16) | (odd & 0xFFFF0000)
        x0, x1 = first & 0x00FF00FF, (first >> 8) & 0x00FF00FF
        x2, x3 = second & 0x00FF00FF, (second >> 8) & 0x00FF00FF
    return x0, x1, x2, x3


@triton.jit
def _three_words(x0, x1, x2):
    """The three words of every two pairs at 3 bit, (columns, pairs/2) each, from the parts of pairs."""
    # Bits 0 to 15 of both periods, and 16 to 23.
    first = x0 | ((x1 & 0x007F007F) << 9)
    second = ((x1 >> 7) & 0x00030003) | (x2 << 2)
    # Bits 0 to 31 of a pair, and 32 to 47: of the first pair, and of the later one.
    low, low_later = _columns((first & 0xFFFF) | (second << 16) | ((first & 0x00FF0000) << 8))
    high, high_later = _columns((first >> 24) | ((second & 0x00FF0000) >> 8))
    return low, high | (low_later << 16), (low_later >> 16) | (high_later << 16)


@triton.jit
def _part(x0, x1, x2, x3, i: tl.constexpr):
    """The i-th of four."""
    return x0 if i == 0 else (x1 if i == 1 else (x2 if i == 2 else x3))


@triton.jit
def _put_part(x0, x1, x2, x3, x, i: tl.constexpr):
    """The four, with ``x`` for the i-th."""
    return x if i == 0 else x0, x if i == 1 else x1, x if i == 2 else x2, x if i == 3 else x3


@triton.jit
def packed_kernel(
    words_ptr, a_ptr, b_ptr, inverse_ptr, scales_ptr, zeros_ptr, omega_ptr,
    new_words_ptr, offset_ptr, moved_ptr, weight_ptr,
    K: tl.constexpr, N: tl.constexpr, words: tl.constexpr, groups: tl.constexpr, rank: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, DROP: tl.constexpr, FLUSH: tl.constexpr,
    COUNT: tl.constexpr, WEIGHT: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile: with WEIGHT its adjusted weight, else its merged words and, with OFFSET, its mu.

    With OFFSET the tile holds whole groups of GROUP consecutive rows; otherwise a group may be any multiple of two
    periods. ``a`` is (tiles, VALUES, BLOCK_P, RANK), ``omega`` what |D| must pass, and omega in three parts.
    """
    tile = tl.program_id(1)
    period = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    r = tl.arange(0, RANK)
    row = tile * (BLOCK_P * VALUES) + tl.arange(0, BLOCK_P * VALUES)
    a = tl.load(a_ptr + row[None, :] * RANK + r[:, None])
    b = tl.load(b_ptr + r[None, :] * N + n[:, None], mask=(r < rank)[None, :] & mask_n[:, None], other=0.0)
    # At 3 bit the words of four periods are 0, 1, 1, 2: neighbours have the two that hold the bits of both.
    word = period // 4 * 3 + (period % 4 + 1) // 2 if BITS == 3 else period
    at = word.to(tl.int64)[None, :] * N + n[:, None]
    there = (word < words)[None, :] & mask_n[:, None]
    w = tl.load(words_ptr + at, mask=there, other=0).to(tl.uint32, bitcast=True)
    d = _pack(tl.dot(_operand(b, INTERPRET), a, out_dtype=tl.float16), INTERPRET)
    d = tl.permute(tl.reshape(d, (BLOCK_N, VALUES, BLOCK_P // 2)), (0, 2, 1))
    even, odd = _columns(w)
    pair = tile * (BLOCK_P // 2) + tl.arange(0, BLOCK_P // 2)
    x0, x1, x2, x3 = _parts(even, odd, (pair % 2 == 1)[None, :], BITS)
    # Bits of a part: whole values, and no more than the ten of a float16's mantissa.
    PART: tl.constexpr = 9 if BITS == 3 else 8
    sum_d = tl.zeros((BLOCK_N, BLOCK_P // 2), tl.uint32)
    sum_t, moved = sum_d, sum_d
    limits = _pack(tl.full((BLOCK_N, BLOCK_P), -tl.load(omega_ptr), tl.float16), INTERPRET)
    for j in tl.static_range(VALUES):
        dj = _value(d, j, VALUES)
        x = _part(x0, x1, x2, x3, j * BITS // PART)
        x, sum_d, sum_t, moved = _take_step(
            x, sum_d, sum_t, moved, dj, limits, j * BITS % PART, BITS, COUNT, INTERPRET
        )  # fmt: skip
        x0, x1, x2, x3 = _put_part(x0, x1, x2, x3, x, j * BITS // PART)
    if not WEIGHT:
        if BITS == 3:
            tl.debug_barrier()  # The new words may lie where the old ones are: both pairs have read a shared one.
            three = _three_words(x0, x1, x2)
            row = (tile * (BLOCK_P // 4) + tl.arange(0, BLOCK_P // 4)) * 3
            for i in tl.static_range(3):
                at = (row + i).to(tl.int64)[None, :] * N + n[:, None]
                there = (row + i < words)[None, :] & mask_n[:, None]
                tl.store(new_words_ptr + at, three[i].to(tl.int32, bitcast=True), mask=there)
        else:
            first = x0 | (x1 << 8)
            second = x2 | (x3 << 8)
            w = _together((first & 0xFFFF) | (second << 16), (first >> 16) | (second & 0xFFFF0000))
            tl.store(new_words_ptr + at, w.to(tl.int32, bitcast=True), mask=there)
    if COUNT:
        count = tl.sum(tl.sum(_unpack(moved, INTERPRET).to(tl.float32), axis=1), axis=0).to(tl.int32)
        tl.store(moved_ptr + tile * tl.num_programs(0) + tl.program_id(0), count)
    group = period * VALUES // GROUP
    at = group[None, :] * N + n[:, None]
    there = (group < groups)[None, :] & mask_n[:, None]
    if OFFSET or WEIGHT:
        ones = (group[:, None] == group[None, :]).to(tl.float16)
        total = tl.dot(_unpack(sum_d, INTERPRET), ones)
        mu = total
    if OFFSET:
        taken = tl.dot(_unpack(sum_t, INTERPRET), ones)
        inverse = tl.load(inverse_ptr + group, mask=group < groups, other=0.0)
        mu = without_steps(total, taken, omega_ptr) * inverse[None, :]
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
            q = _part(x0, x1, x2, x3, j * BITS // PART) >> (j * BITS % PART)
            even = affine(q & (2**BITS - 1), z, s, mu, OFFSET)
            odd = affine((q >> 16) & (2**BITS - 1), z, s, mu, OFFSET)
            weight = _together(even.to(kind), odd.to(kind))
            row = period * VALUES + j
            at = row.to(tl.int64)[None, :] * N + n[:, None]
            tl.store(weight_ptr + at, weight, mask=(row < K)[None, :] & mask_n[:, None])
