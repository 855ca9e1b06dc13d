"""Plain Triton kernels of the merge: unpack, A @ B on tensor cores, step and offset; and dequantise.

:mod:`.packed` is the faster merge, which takes all but high ranks.

A tile holds ``BLOCK_P`` periods of the bitstream (see :mod:`lotaqaf_jax.quant.packing`; a period is 8 values in one
word at 4 bit, 32 values in three words at 3 bit) by ``BLOCK_N`` columns. Value j of every period is taken at once: row
j, j + VALUES, j + 2*VALUES, ... of A, multiplied by B, lies in registers exactly where the words that hold these values
lie, so nothing has to be moved between threads to add a step to a packed integer. The tile's words with the steps added
are the merged words; the weight is dequantised from them, so adapted and merged weights cannot differ.

D = A @ B is a sum of small integers: exact in the accumulators, in any order. The rounding steps are those of
:mod:`lotaqaf_jax.ternary`, and the kernels are compiled without contraction of products and sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lotaqaf_jax.kernels.words import neighbours

__all__ = ["affine", "dequantize_kernel", "group_steps_kernel", "merge_kernel", "short_float", "without_steps"]


@triton.jit
def _read(w0, w1, w2, j: tl.constexpr, BITS: tl.constexpr):
    """Value j of every period, int32."""
    first: tl.constexpr = (j * BITS) // 32
    shift: tl.constexpr = (j * BITS) % 32
    low, high = neighbours(w0, w1, w2, first)
    value = low >> shift
    if shift + BITS > 32:
        value |= high << (32 - shift)
    return (value & (2**BITS - 1)).to(tl.int32)


@triton.jit
def _add(w0, w1, w2, change, j: tl.constexpr, BITS: tl.constexpr):
    """Add ``change`` (int32; the sum stays on the grid) to value j of every period."""
    first: tl.constexpr = (j * BITS) // 32
    shift: tl.constexpr = (j * BITS) % 32
    if shift + BITS <= 32:
        # In two's complement the sum of whole words is the sum of the value alone, as long as it stays on the grid.
        up = change.to(tl.uint32, bitcast=True) << shift
        if first == 0:
            w0 += up
        elif first == 1:
            w1 += up
        else:
            w2 += up
    else:
        old = _read(w0, w1, w2, j, BITS)
        flip = (old ^ (old + change)).to(tl.uint32, bitcast=True)
        if first == 0:
            w0 ^= flip << shift
            w1 ^= flip >> (32 - shift)
        else:
            w1 ^= flip << shift
            w2 ^= flip >> (32 - shift)
    return w0, w1, w2


@triton.jit
def _load_words(words_ptr, period, n, mask_n, words, N, WORDS: tl.constexpr):
    """The WORDS words of every period, uint32; 0 where there are none."""
    row = period * WORDS
    at = words_ptr + row.to(tl.int64)[:, None] * N + n[None, :]
    w0 = tl.load(at, mask=(row < words)[:, None] & mask_n[None, :], other=0).to(tl.uint32, bitcast=True)
    w1 = w0
    w2 = w0
    if WORDS == 3:
        w1 = tl.load(at + N, mask=(row + 1 < words)[:, None] & mask_n[None, :], other=0).to(tl.uint32, bitcast=True)
        w2 = tl.load(at + 2 * N, mask=(row + 2 < words)[:, None] & mask_n[None, :], other=0).to(tl.uint32, bitcast=True)
    return w0, w1, w2


@triton.jit
def _store_words(words_ptr, w0, w1, w2, period, n, mask_n, words, N, WORDS: tl.constexpr):
    row = period * WORDS
    at = words_ptr + row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, w0.to(tl.int32, bitcast=True), mask=(row < words)[:, None] & mask_n[None, :])
    if WORDS == 3:
        tl.store(at + N, w1.to(tl.int32, bitcast=True), mask=(row + 1 < words)[:, None] & mask_n[None, :])
        tl.store(at + 2 * N, w2.to(tl.int32, bitcast=True), mask=(row + 2 < words)[:, None] & mask_n[None, :])


@triton.jit
def _take_steps(
    w0, w1, w2, a_ptr, b_ptr, period, n, mask_n, K, N, rank, limit,
    BITS: tl.constexpr, VALUES: tl.constexpr, RANK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Words with the steps added, and the sums of D, T and |T| over the values of a period, (BLOCK_P, BLOCK_N).

    The plain way, for every width: float32 and int32, one value of one column at a time.
    """
    r = tl.arange(0, RANK)
    b = tl.load(b_ptr + r[:, None] * N + n[None, :], mask=(r < rank)[:, None] & mask_n[None, :], other=0.0)
    sum_d = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    sum_t = tl.zeros((BLOCK_P, BLOCK_N), tl.int32)
    moved = tl.zeros((BLOCK_P, BLOCK_N), tl.int32)
    n0, n1, n2 = w0, w1, w2
    for j in tl.static_range(VALUES):
        row = period * VALUES + j
        a = tl.load(a_ptr + row[:, None] * rank + r[None, :], mask=(row < K)[:, None] & (r < rank)[None, :], other=0.0)
        d = tl.dot(a, b)
        q = _read(w0, w1, w2, j, BITS)
        t = (d > limit).to(tl.int32) - (d < -limit).to(tl.int32)
        t = tl.minimum(tl.maximum(q + t, 0), 2**BITS - 1) - q
        n0, n1, n2 = _add(n0, n1, n2, t, j, BITS)
        sum_d += d
        sum_t += t
        moved += tl.abs(t)
    return n0, n1, n2, sum_d, sum_t, moved


@triton.jit
def _by_group(per_period, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum over the periods of every group: (BLOCK_P, BLOCK_N) -> (GROUPS, BLOCK_N)."""
    return tl.sum(tl.reshape(per_period, (GROUPS, BLOCK_P // GROUPS, BLOCK_N)), axis=1)


@triton.jit
def without_steps(total, taken, omega_ptr):
    """sum of D - omega * sum of T, with omega in three parts, from 1 on, whose products with ``taken`` are exact."""
    total -= tl.load(omega_ptr + 1) * taken
    total -= tl.load(omega_ptr + 2) * taken
    total -= tl.load(omega_ptr + 3) * taken
    return total


@triton.jit
def short_float(x, DROP: tl.constexpr, FLUSH: tl.constexpr):
    """Round float32 to nearest, ties to even, leaving off DROP bits of the mantissa; below 2**-14 to 0 if FLUSH."""
    bits = x.to(tl.int32, bitcast=True)
    half: tl.constexpr = (1 << (DROP - 1)) - 1
    bits = (bits + half + ((bits >> DROP) & 1)) & -(1 << DROP)
    x = bits.to(tl.float32, bitcast=True)
    if FLUSH:
        x = tl.where(tl.abs(x) < 6.103515625e-05, 0.0, x)
    return x


@triton.jit
def affine(q, z, s, mu, OFFSET: tl.constexpr):
    """s * ((q - z) + mu) in float32."""
    # 2**23 + q without a conversion, which is slow: q becomes the low bits of the mantissa.
    value = (q | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + z)
    if OFFSET:
        value = value + mu
    return s * value


@triton.jit
def merge_kernel(
    words_ptr, a_ptr, b_ptr, inverse_ptr, omega_ptr,
    new_words_ptr, offset_ptr, moved_ptr,
    K: tl.constexpr, N: tl.constexpr, words: tl.constexpr, groups: tl.constexpr, rank: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, DROP: tl.constexpr, FLUSH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merged words of one tile, and its offset, for which it holds whole groups of GROUP consecutive rows.

    ``omega`` is what |D| must pass, and omega in three parts. Without OFFSET no group matters, and GROUP is not looked
    at. The new words may lie where the old ones are.
    """
    tile = tl.program_id(1)
    period = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    w0, w1, w2 = _load_words(words_ptr, period, n, mask_n, words, N, WORDS)
    n0, n1, n2, sum_d, sum_t, moved = _take_steps(
        w0,
        w1,
        w2,
        a_ptr,
        b_ptr,
        period,
        n,
        mask_n,
        K,
        N,
        rank,
        tl.load(omega_ptr),
        BITS,
        VALUES,
        RANK,
        BLOCK_P,
        BLOCK_N,
    )
    _store_words(new_words_ptr, n0, n1, n2, period, n, mask_n, words, N, WORDS)
    if COUNT:
        count = tl.sum(tl.sum(moved.to(tl.float32), axis=1), axis=0).to(tl.int32)
        tl.store(moved_ptr + tile * tl.num_programs(0) + tl.program_id(0), count)
    if OFFSET:
        PERIODS: tl.constexpr = GROUP // VALUES
        GROUPS: tl.constexpr = BLOCK_P // PERIODS
        total = _by_group(sum_d, GROUPS, BLOCK_P, BLOCK_N)
        taken = _by_group(sum_t, GROUPS, BLOCK_P, BLOCK_N)
        group = tile * GROUPS + tl.arange(0, GROUPS)
        first = group < groups
        total = without_steps(total, taken, omega_ptr)
        inverse = tl.load(inverse_ptr + group, mask=first, other=0.0)
        mu = short_float(total * inverse[:, None], DROP, FLUSH)
        at = offset_ptr + group[:, None] * N + n[None, :]
        tl.store(at, mu.to(offset_ptr.dtype.element_ty), mask=first[:, None] & mask_n[None, :])


@triton.jit
def group_steps_kernel(
    old_ptr, new_ptr, order_ptr, start_ptr,
    taken_ptr,
    N: tl.constexpr, words: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum of T over the rows of one group, from the words before and after; ``order`` lists the rows by group."""
    group = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    total = tl.zeros((BLOCK_N,), tl.int32)
    k = tl.load(start_ptr + group)
    end = tl.load(start_ptr + group + 1)
    while k < end:
        bit = tl.load(order_ptr + k) * BITS
        word = (bit // 32).to(tl.int64)
        shift = bit % 32
        old = tl.load(old_ptr + word * N + n, mask=mask_n, other=0).to(tl.uint32, bitcast=True) >> shift
        new = tl.load(new_ptr + word * N + n, mask=mask_n, other=0).to(tl.uint32, bitcast=True) >> shift
        if BITS == 3:
            # Values that straddle two words; a shift by 32 is undefined, so in two steps.
            more = mask_n & (shift > 29)
            high = tl.load(old_ptr + (word + 1) * N + n, mask=more & (word + 1 < words), other=0)
            old |= (high.to(tl.uint32, bitcast=True) << (31 - shift)) << 1
            high = tl.load(new_ptr + (word + 1) * N + n, mask=more & (word + 1 < words), other=0)
            new |= (high.to(tl.uint32, bitcast=True) << (31 - shift)) << 1
        total += (new & (2**BITS - 1)).to(tl.int32) - (old & (2**BITS - 1)).to(tl.int32)
        k += 1
    tl.store(taken_ptr + group * N + n, total.to(tl.float32), mask=mask_n)


@triton.jit
def dequantize_kernel(
    words_ptr, scales_ptr, zeros_ptr, offset_ptr, group_ptr,
    weight_ptr,
    K: tl.constexpr, N: tl.constexpr, words: tl.constexpr, groups: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W from packed words. GROUP is the rows of a group, or 0: then ``group_ptr`` gives the group of every row."""
    period = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    w0, w1, w2 = _load_words(words_ptr, period, n, mask_n, words, N, WORDS)
    s = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    z = s
    mu = s
    for j in tl.static_range(VALUES):
        row = period * VALUES + j
        # Where a period lies in one group, its scales are loaded once.
        if GROUP == 0 or GROUP % VALUES != 0 or j == 0:
            group = row // GROUP if GROUP != 0 else tl.load(group_ptr + row, mask=row < K, other=0)
            mask = (row < K)[:, None] & mask_n[None, :]
            at = group[:, None] * N + n[None, :]
            s = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)
            if OFFSET:
                mu = tl.load(offset_ptr + at, mask=mask, other=0.0).to(tl.float32)
        value = affine(_read(w0, w1, w2, j, BITS), z, s, mu, OFFSET)
        at = weight_ptr + row.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, value.to(weight_ptr.dtype.element_ty), mask=(row < K)[:, None] & mask_n[None, :])
