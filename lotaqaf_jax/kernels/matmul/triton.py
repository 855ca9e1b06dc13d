"""Triton kernel of the packed matmul: y = x @ s * (q - z + mu), the weights straight from their words.

The weights are the left operand of the tensor cores, W^T @ x^T, and no operand passes through shared memory. A warp
loads words so that they lie where the operand's fragments lie: lane 4a + p holds four neighbouring columns 4a..4a + 3 of
period p, one load of 16 bytes. The columns of the product, and the order in which it runs over k, are permuted to fit:
every period is a set of pairs (value i, value i + VALUES/2) that lie 16 bits apart, so that one shift, one logical
operation and one addition of packed halves make two operands, and only x has to follow that order, inside its registers.

Warps of a program take turns along k, each with its own accumulators (the batch axis of ``tl.dot``), which are added at
the end in a fixed order. An integer becomes a float by becoming the low bits of a mantissa (128 + q in bfloat16, 1024 + q
in float16), from which 128 + z is subtracted, exactly. Each group is summed in float32 and then multiplied by its
scale: nothing but q - z + mu is rounded to 16 bits, and that only where there is an offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["matmul_kernel"]


@triton.jit
def _halves(w0, w1, w2, i: tl.constexpr, BITS: tl.constexpr):
    """Values i and i + VALUES/2 of every period, as the low bits of the halves of a word; other bits are not cleared."""
    first: tl.constexpr = (i * BITS) // 16
    shift: tl.constexpr = (i * BITS) % 16
    # Word k holds the bits 16k to 16k + 15 of both halves of the period.
    if first == 0:
        low, high = w0, w1
    elif first == 1:
        low, high = w1, w2
    else:
        low, high = w2, w2
    value = low >> shift
    if shift + BITS > 16:
        kept: tl.constexpr = (2 ** (16 - shift) - 1) * 0x10001
        value = (value & kept) | ((high << (16 - shift)) & (0xFFFFFFFF - kept))
    return value


@triton.jit
def _half(v, dtype: tl.constexpr):
    return (v & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _pair(
    w0, w1, w2, zero, mu, i: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """q - z + mu of values i and i + VALUES/2 of every period, 16 bit floats (..., 2)."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    v = _halves(w0, w1, w2, i, BITS)
    if BITS == 8 and BF16:
        # 256 values do not fit the mantissa of bfloat16, their differences do.
        low = ((v & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - zero
        high = (((v >> 16) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - zero
        if OFFSET:
            low += mu
            high += mu
        low = low.to(dtype)
        high = high.to(dtype)
    elif not INTERPRET:
        low, high = _packed_steps(v, zero, mu, BITS, OFFSET, BF16)
    else:
        v = (v & ((2**BITS - 1) * 0x10001)) | (0x43004300 if BF16 else 0x64006400)
        low = _half(v, dtype) + _half(zero, dtype)
        high = _half(v >> 16, dtype) + _half(zero >> 16, dtype)
        if OFFSET:
            low += _half(mu, dtype)
            high += _half(mu >> 16, dtype)
        low = low.to(dtype)
        high = high.to(dtype)
    return tl.join(low, high)


@triton.jit
def _packed_steps(v, zero, mu, BITS: tl.constexpr, OFFSET: tl.constexpr, BF16: tl.constexpr):
    """Two halves at a time: mask, set the exponent, subtract 128 + z (``zero`` is its negative), add mu."""
    mask = tl.full((1,), (2**BITS - 1) * 0x10001, tl.uint32)
    exponent = tl.full((1,), 0x43004300 if BF16 else 0x64006400, tl.uint32)
    if BF16:
        if OFFSET:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 t, one;
                mov.b32 one, 0x3F803F80;
                lop3.b32 t, $2, $3, $4, 0xEA;
                fma.rn.bf16x2 t, t, one, $5;
                fma.rn.bf16x2 t, t, one, $6;
                mov.b32 {$0, $1}, t;
                }""",
                "=h,=h,r,r,r,r,r", [v, mask, exponent, zero, mu], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 t, one;
                mov.b32 one, 0x3F803F80;
                lop3.b32 t, $2, $3, $4, 0xEA;
                fma.rn.bf16x2 t, t, one, $5;
                mov.b32 {$0, $1}, t;
                }""",
                "=h,=h,r,r,r,r", [v, mask, exponent, zero], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
            )  # fmt: skip
    else:
        if OFFSET:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 t;
                lop3.b32 t, $2, $3, $4, 0xEA;
                add.rn.f16x2 t, t, $5;
                add.rn.f16x2 t, t, $6;
                mov.b32 {$0, $1}, t;
                }""",
                "=h,=h,r,r,r,r,r", [v, mask, exponent, zero, mu], dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 t;
                lop3.b32 t, $2, $3, $4, 0xEA;
                add.rn.f16x2 t, t, $5;
                mov.b32 {$0, $1}, t;
                }""",
                "=h,=h,r,r,r,r", [v, mask, exponent, zero], dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
            )  # fmt: skip
    return low, high


@triton.jit
def _quad(
    w0, w1, w2, zero, mu, i: tl.constexpr, step: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Pairs i, i + step, i + 2*step, i + 3*step: (..., 2, 2, 2), their order the last two axes."""
    a = _pair(w0, w1, w2, zero, mu, i, BITS, OFFSET, BF16, INTERPRET)
    b = _pair(w0, w1, w2, zero, mu, i + step, BITS, OFFSET, BF16, INTERPRET)
    c = _pair(w0, w1, w2, zero, mu, i + 2 * step, BITS, OFFSET, BF16, INTERPRET)
    d = _pair(w0, w1, w2, zero, mu, i + 3 * step, BITS, OFFSET, BF16, INTERPRET)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _operand(
    w0, w1, w2, zero, mu, BITS: tl.constexpr, OFFSET: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """q - z + mu of all values of every period: (..., 2, ...), the pairs' order in the last axes."""
    if BITS == 8:
        # Two words of four values make a period here: pairs 0 and 1 of the first, 0 and 1 of the second.
        a = _pair(w0, w0, w0, zero, mu, 0, 8, OFFSET, BF16, INTERPRET)
        b = _pair(w0, w0, w0, zero, mu, 1, 8, OFFSET, BF16, INTERPRET)
        c = _pair(w1, w1, w1, zero, mu, 0, 8, OFFSET, BF16, INTERPRET)
        d = _pair(w1, w1, w1, zero, mu, 1, 8, OFFSET, BF16, INTERPRET)
        out = tl.join(tl.join(a, c), tl.join(b, d))
    elif BITS == 4:
        out = _quad(w0, w0, w0, zero, mu, 0, 1, 4, OFFSET, BF16, INTERPRET)
    elif BITS == 2:
        a = _quad(w0, w0, w0, zero, mu, 0, 2, 2, OFFSET, BF16, INTERPRET)
        b = _quad(w0, w0, w0, zero, mu, 1, 2, 2, OFFSET, BF16, INTERPRET)
        out = tl.join(a, b)
    else:
        # The 96 bits of a period as 16 values in the low, 16 in the high halves of three words.
        v0 = (w0 & 0xFFFF) | (w1 & 0xFFFF0000)
        v1 = (w0 >> 16) | (w2 << 16)
        v2 = (w1 & 0xFFFF) | (w2 & 0xFFFF0000)
        a = _quad(v0, v1, v2, zero, mu, 0, 4, 3, OFFSET, BF16, INTERPRET)
        b = _quad(v0, v1, v2, zero, mu, 1, 4, 3, OFFSET, BF16, INTERPRET)
        c = _quad(v0, v1, v2, zero, mu, 2, 4, 3, OFFSET, BF16, INTERPRET)
        d = _quad(v0, v1, v2, zero, mu, 3, 4, 3, OFFSET, BF16, INTERPRET)
        out = tl.join(tl.join(a, c), tl.join(b, d))
    return out


@triton.jit
def _load_words(words_ptr, period, n, words, N, t: tl.constexpr, WORDS: tl.constexpr):
    """Word t of every period, uint32; 0 where there is none."""
    row = period * WORDS + t
    return tl.load(words_ptr + row * N + n, mask=(row < words) & (n < N), other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _load_group(ptr, period, n, groups, N, VALUES: tl.constexpr, GROUP: tl.constexpr):
    """What belongs to the group of every period."""
    group = period * VALUES // GROUP
    return tl.load(ptr + group * N + n, mask=(group < groups) & (n < N), other=0)


@triton.jit
def _two_halves(value, BF16: tl.constexpr):
    """A float twice in the halves of a word."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    return value.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001


@triton.jit
def _load_x(x_ptr, row, k, rows, K):
    return tl.load(x_ptr + row * K + k, mask=(row < rows) & (k < K), other=0.0)


@triton.jit
def _right(
    x, BITS: tl.constexpr, VALUES: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """x (4, 8, WARPS, STEPS, ROWS/8, VALUES...) in the order of the product, (WARPS, k, ROWS)."""
    if BITS == 8:
        # (word, half, place) -> pairs in the order (word, place), then half
        x = tl.reshape(x, (4, 8, WARPS, STEPS, ROWS // 8, 2, 2, 2))
        x = tl.permute(x, (2, 3, 5, 0, 7, 6, 4, 1))
    else:
        x = tl.reshape(x, (4, 8, WARPS, STEPS, ROWS // 8, 2, VALUES // 4, 2))
        x = tl.permute(x, (2, 3, 6, 0, 7, 5, 4, 1))
    return tl.reshape(x, (WARPS, STEPS * 4 * VALUES, ROWS))


@triton.jit
def matmul_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, offset_ptr, bias_ptr, layer_ptr,
    rows, K, N, words, groups,
    y_ptr,
    BITS: tl.constexpr, VALUES: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, LAYER: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr,
    AHEAD: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """ROWS rows by 32*TILES columns of y, over all k or, with SPLIT, a part of it.

    A warp's body is STEPS steps of four periods. PARTS is 1 where a body lies in one group of GROUP rows; where a group
    is smaller than a step (then STEPS is 1), the number of groups in a step: x is masked to one of them at a time.
    """
    COLUMNS: tl.constexpr = 32 * TILES
    J: tl.constexpr = min(VALUES, 16 // (x_ptr.dtype.element_ty.primitive_bitwidth // 8))
    # Axes (p, a, warp, step, tile, column): p is the period in a step, a and column the place in 32 columns. Triton
    # deals the lanes to the first axes after the contiguous one, which is what puts p and a where they have to be.
    p = tl.arange(0, 4)[:, None, None, None, None, None]
    a = tl.arange(0, 8)[None, :, None, None, None, None]
    worker = tl.program_id(1) * WARPS + tl.arange(0, WARPS)[None, None, :, None, None, None]
    step = tl.arange(0, STEPS)[None, None, None, :, None, None]
    tile = tl.arange(0, TILES)[None, None, None, None, :, None]
    n = tl.program_id(0) * COLUMNS + tile * 32 + a * 4 + tl.arange(0, 4)[None, None, None, None, None, :]
    # x has the axes (p, a, warp, step, ROWS/8, VALUES/J, J), a being the row in eight.
    xp = tl.arange(0, 4)[:, None, None, None, None, None, None]
    xa = tl.arange(0, 8)[None, :, None, None, None, None, None]
    xworker = tl.program_id(1) * WARPS + tl.arange(0, WARPS)[None, None, :, None, None, None, None]
    xstep = tl.arange(0, STEPS)[None, None, None, :, None, None, None]
    eights = tl.arange(0, ROWS // 8)[None, None, None, None, :, None, None]
    jh = tl.arange(0, VALUES // J)[None, None, None, None, None, :, None]
    jl = tl.arange(0, J)[None, None, None, None, None, None, :]
    row = tl.program_id(2) * ROWS + eights * 8 + xa
    if LAYER:
        layer = tl.load(layer_ptr).to(tl.int64)
        words_ptr += layer * words * N
        scales_ptr += layer * groups * N
        zeros_ptr += layer * groups * N
        offset_ptr += layer * groups * N
        bias_ptr += layer * N

    period = (worker * STEPS + step) * 4 + p
    first = worker * STEPS * 4 + p  # of the first step, in the group of all where PARTS is 1
    k = ((xworker * STEPS + xstep) * 4 + xp) * VALUES + jh * J + jl
    w0 = _load_words(words_ptr, period, n, words, N, 0, WORDS)
    if WORDS > 1:
        w1 = _load_words(words_ptr, period, n, words, N, 1, WORDS)
    if WORDS > 2:
        w2 = _load_words(words_ptr, period, n, words, N, 2, WORDS)
    z = _load_group(zeros_ptr, first, n, groups, N, VALUES, GROUP)
    if AHEAD:
        next_x = _load_x(x_ptr, row, k, rows, K)
    total = tl.zeros((WARPS, COLUMNS, ROWS), tl.float32)
    ahead: tl.constexpr = SPLIT * WARPS * STEPS * 4  # periods
    for _ in range(0, ROUNDS):
        # Loaded a round ahead of their use.
        next_w0 = _load_words(words_ptr, period + ahead, n, words, N, 0, WORDS)
        if WORDS > 1:
            next_w1 = _load_words(words_ptr, period + ahead, n, words, N, 1, WORDS)
        if WORDS > 2:
            next_w2 = _load_words(words_ptr, period + ahead, n, words, N, 2, WORDS)
        next_z = _load_group(zeros_ptr, first + ahead, n, groups, N, VALUES, GROUP)
        if AHEAD:
            x = next_x
            next_x = _load_x(x_ptr, row, k + ahead * VALUES, rows, K)
        else:
            x = _load_x(x_ptr, row, k, rows, K)
        mu = z
        if OFFSET:
            mu = _load_group(offset_ptr, first, n, groups, N, VALUES, GROUP)
        if BITS == 8 and BF16:
            zero = (z.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
            if OFFSET:
                mu = mu.to(tl.float32)
        else:
            zero = z.to(tl.uint32) * 0x10001 | (0xC300C300 if BF16 else 0xE400E400)
            if OFFSET:
                mu = _two_halves(mu, BF16)
        if WORDS == 1:
            left = _operand(w0, w0, w0, zero, mu, BITS, OFFSET, BF16, INTERPRET)
        elif WORDS == 2:
            left = _operand(w0, w1, w1, zero, mu, BITS, OFFSET, BF16, INTERPRET)
        else:
            left = _operand(w0, w1, w2, zero, mu, BITS, OFFSET, BF16, INTERPRET)
        # (p, a, warp, step, tile, column, half, pairs) -> (warp, (tile, column, a), (step, pairs, p, pair in 2, half))
        left = tl.reshape(left, (4, 8, WARPS, STEPS, TILES, 4, 2, VALUES // 4, 2))
        left = tl.permute(left, (2, 4, 5, 1, 3, 7, 0, 8, 6))
        left = tl.reshape(left, (WARPS, COLUMNS, STEPS * 4 * VALUES))
        for part in tl.static_range(PARTS):
            s = _load_group(scales_ptr, first - p + part * (4 // PARTS), n, groups, N, VALUES, GROUP).to(tl.float32)
            xs = x
            if PARTS > 1:
                xs = tl.where(xp // (4 // PARTS) == part, x, 0.0)
            if x_ptr.dtype.element_ty == tl.float32 and not INTERPRET:
                # Three parts of 8 bits each are the whole of a float32.
                high = xs.to(tl.bfloat16)
                rest = xs - high.to(tl.float32)
                middle = rest.to(tl.bfloat16)
                low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
                dot = tl.dot(left, _right(low, BITS, VALUES, STEPS, WARPS, ROWS))
                dot = tl.dot(left, _right(middle, BITS, VALUES, STEPS, WARPS, ROWS), dot)
                dot = tl.dot(left, _right(high, BITS, VALUES, STEPS, WARPS, ROWS), dot)
            elif INTERPRET:
                # The interpreter has no product of bfloat16.
                right = _right(xs.to(tl.float32), BITS, VALUES, STEPS, WARPS, ROWS)
                dot = tl.dot(left.to(tl.float32), right, input_precision="ieee")
            else:
                dot = tl.dot(left, _right(xs, BITS, VALUES, STEPS, WARPS, ROWS))
            # The scales lie where the accumulators lie, p taking the place of a pair of rows.
            s = tl.reshape(tl.permute(s, (2, 4, 5, 1, 3, 0)), (WARPS, COLUMNS, 1, 4, 1))
            s = tl.reshape(tl.broadcast_to(s, (WARPS, COLUMNS, ROWS // 8, 4, 2)), (WARPS, COLUMNS, ROWS))
            total += dot * s
        w0 = next_w0
        if WORDS > 1:
            w1 = next_w1
        if WORDS > 2:
            w2 = next_w2
        z = next_z
        period += ahead
        first += ahead
        k += ahead * VALUES

    y = tl.sum(total, axis=0)
    m = tl.arange(0, COLUMNS)
    column = tl.program_id(0) * COLUMNS + (m // 32) * 32 + (m % 8) * 4 + (m // 8) % 4
    out = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + (tl.program_id(1) * rows + out)[None, :] * N + column[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(out < rows)[None, :] & (column < N)[:, None])
