"""Triton kernel of the packed matmul for up to 16 rows: y = x @ s * (q - z + mu), the weights from their words.

The weights are the left operand of the tensor cores, W^T @ x^T, and no operand passes through shared memory. A warp
loads words so that they lie where the operand's fragments lie: lane 4a + p holds four neighbouring columns, 4a to
4a + 3, of period p, one load of 16 bytes. The columns of the product, and the order in which it runs over k, are
permuted to fit: :mod:`.operand` makes the operands, and only x has to follow their order, inside its registers. None
of this is asked of Triton; it follows from the axes the tensors are given, and where Triton deals otherwise the result
is the same and slower.

Warps of a program take turns along k, each with its own accumulators (the batch axis of ``tl.dot``), which are added
at the end in a fixed order. Each group is summed in float32 and then multiplied by its scale.

What was tried and lost on an H200, for up to 8 rows: words and x through shared memory in Triton's pipeline (two
barriers a round, and x past the first-level cache, where every program asks for the same lines: 1.4 times the time and
more).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lotaqaf_jax.kernels.matmul.operand import operand, two_halves, zero_of
from lotaqaf_jax.kernels.matmul.weights import arrays_of_weight, of_weight, plus_bias

__all__ = ["matmul_kernel"]


@triton.jit
def _load_round(
    r, at, words_ptr, scales_ptr, zeros_ptr, offset_ptr, word_at, zero_at, scale_at, n, word, first, of_part,
    N, words, groups,
    VALUES: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, OFFSET: tl.constexpr,
    EVEN: tl.constexpr, LINEAR: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Words, z, mu and s of round ``at``, the ``r``-th; s and mu are 0 outside of the matrix, the others anything."""
    word_at = tl.max_contiguous(word_at + at * (SPAN * WORDS * N), (2, 1, 1, 4))
    if LINEAR:
        # Every round moves on by as many groups.
        z_group = first + at * (SPAN * VALUES // GROUP)
        s_group = of_part + at * (SPAN * VALUES // GROUP)
        zero_at = tl.max_contiguous(zero_at + at * ((SPAN * VALUES // GROUP) * N), (2, 1, 1, 4))
        scale_at = tl.max_contiguous(scale_at + at * ((SPAN * VALUES // GROUP) * N), (2, 1, 1, 4))
    else:
        z_group = ((first + at * SPAN).to(tl.uint32) * VALUES // GROUP).to(tl.int32)
        s_group = ((of_part + at * SPAN * VALUES).to(tl.uint32) // GROUP).to(tl.int32)
        zero_at = tl.max_contiguous(zero_at + z_group * N, (2, 1, 1, 4))
        scale_at = tl.max_contiguous(scale_at + s_group * N, (2, 1, 1, 4))
    if EVEN:
        there = r < ROUNDS
        more = there
        most = there
        z_there = there
        s_there = there
    else:
        word += at * (SPAN * WORDS)
        there = (word < words) & (n < N)
        more = (word + 1 < words) & (n < N)
        most = (word + 2 < words) & (n < N)
        z_there = (z_group < groups) & (n < N)
        s_there = (s_group < groups) & (n < N)
    # Words are read once: they are not to push x out of the cache.
    w0 = tl.load(words_ptr + word_at, mask=there, eviction_policy="evict_first")
    w1 = w0
    w2 = w0
    if WORDS > 1:
        w1 = tl.load(words_ptr + (word_at + N), mask=more, eviction_policy="evict_first")
    if WORDS > 2:
        w2 = tl.load(words_ptr + (word_at + 2 * N), mask=most, eviction_policy="evict_first")
    z = tl.load(zeros_ptr + zero_at, mask=z_there)
    mu = z
    if EVEN:
        s = tl.load(scales_ptr + scale_at, mask=s_there)
        if OFFSET:
            mu = tl.load(offset_ptr + zero_at, mask=z_there)
    else:
        s = tl.load(scales_ptr + scale_at, mask=s_there, other=0.0)
        if OFFSET:
            mu = tl.load(offset_ptr + zero_at, mask=z_there, other=0.0)
    return w0, w1, w2, z, mu, s


@triton.jit
def _load_x(
    r, at, x_ptr, x_at, xk, K, VALUES: tl.constexpr, SPAN: tl.constexpr, EVEN: tl.constexpr, ROUNDS: tl.constexpr
):  # fmt: skip
    """x of round ``at``, the ``r``-th; 0 beyond K."""
    J: tl.constexpr = x_at.shape[4] // 32
    xk += at * (SPAN * VALUES)
    x_at = tl.max_contiguous(x_at + at * (SPAN * VALUES), (2, 1, 1, 1, J))
    if EVEN:
        return tl.load(x_ptr + x_at, mask=r < ROUNDS)
    else:
        return tl.load(x_ptr + x_at, mask=xk < K, other=0.0)


@triton.jit
def _place(r, start, ROUNDS: tl.constexpr):
    """The round that comes r-th in a program that starts at ``start``."""
    at = r + start
    return tl.where(at >= ROUNDS, at - ROUNDS, at)


@triton.jit
def _of_part(s, part: tl.constexpr, PARTS: tl.constexpr):
    """The scales of one part: (W, PARTS, TILES, 128) -> (W, 1, TILES, 128)."""
    if PARTS == 1:
        out = s
    else:
        W: tl.constexpr = s.shape[0]
        TILES: tl.constexpr = s.shape[2]
        s = tl.permute(s, (0, 2, 3, 1))
        if PARTS == 4:
            even, odd = tl.split(tl.reshape(s, (W, TILES, 128, 2, 2)))
            s = even if part % 2 == 0 else odd
        low, high = tl.split(s)
        s = low if part // (PARTS // 2) == 0 else high
        out = tl.reshape(s, (W, 1, TILES, 128))
    return out


@triton.jit
def _right(
    x, BITS: tl.constexpr, VALUES: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """x (WARPS, STEPS, ROWS/8, VALUES/J, 32*J) in the order of the product, (WARPS, k, ROWS)."""
    # (warp, step, rows in eights, value high, row in eight, period, value low) -> values together
    J: tl.constexpr = x.shape[4] // 32
    x = tl.reshape(x, (WARPS, STEPS, ROWS // 8, VALUES // J, 8, 4, J))
    x = tl.permute(x, (0, 1, 2, 4, 5, 3, 6))
    if BITS == 8:
        # (word, half, place) -> pairs in the order (word, place), then half
        x = tl.reshape(x, (WARPS, STEPS, ROWS, 4, 2, 2, 2))
        x = tl.permute(x, (0, 1, 4, 3, 6, 5, 2))
    else:
        x = tl.reshape(x, (WARPS, STEPS, ROWS, 4, 2, VALUES // 4, 2))
        x = tl.permute(x, (0, 1, 5, 3, 6, 4, 2))
    return tl.reshape(x, (WARPS, STEPS * 4 * VALUES, ROWS))


@triton.jit
def matmul_kernel(
    x_ptr,
    words0_ptr, scales0_ptr, zeros0_ptr, offset0_ptr, bias0_ptr,
    words1_ptr, scales1_ptr, zeros1_ptr, offset1_ptr, bias1_ptr,
    words2_ptr, scales2_ptr, zeros2_ptr, offset2_ptr, bias2_ptr,
    layer_ptr,
    rows,
    y0_ptr, y1_ptr, y2_ptr,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    words: tl.constexpr, groups: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, LAYER: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr,
    ROUNDS: tl.constexpr, EVEN: tl.constexpr, LINEAR: tl.constexpr, ROTATE: tl.constexpr,
    AHEAD: tl.constexpr, X_AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """ROWS rows by 32*TILES columns of y, over all k or, with SPLIT, a part of it, in ROUNDS rounds of all warps.

    Up to three weights of N0, N1 and N2 columns have their blocks of columns one behind the other; N1 and N2 are 0
    where there are fewer. A program works on one of them, and what it does depends on the weight in pointers and N
    alone.
    A warp's round is STEPS steps of four periods. PARTS is 1 where it lies in one group of GROUP rows; where a group
    is smaller than a step (then STEPS is 1), the number of groups in a step: x is masked to one of them at a time.
    EVEN: rounds and columns cover the matrix exactly. LINEAR: a round covers whole groups, or there is only one.
    Words, zeros and scales are loaded AHEAD rounds before they are used, x X_AHEAD. With ROTATE programs start in
    different rounds, so that they do not all ask for the same x at once.
    """
    COLUMNS: tl.constexpr = 32 * TILES
    END0: tl.constexpr = (N0 + COLUMNS - 1) // COLUMNS
    END1: tl.constexpr = END0 + (N1 + COLUMNS - 1) // COLUMNS
    END2: tl.constexpr = END1 + (N2 + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    y_ptr = of_weight(program, y0_ptr, y1_ptr, y2_ptr, END0, END1, END2)
    if (N1 == N0 or N1 == 0) and (N2 == N0 or N2 == 0):
        N: tl.constexpr = N0
    else:
        # Triton knows what divides all of them, which is as good as a constant.
        N = of_weight(program, N0, N1, N2, END0, END1, END2)
    block = program - of_weight(program, 0, END0, END1, END0, END1, END2)
    J: tl.constexpr = min(VALUES, 16 // (x_ptr.dtype.element_ty.primitive_bitwidth // 8))
    SPAN: tl.constexpr = SPLIT * WARPS * STEPS * 4  # periods in a round
    # Axes (warp, step, tile, place). Triton deals the lanes of a warp to the last axis, four words to each: lane 4a + p
    # takes columns 4a to 4a + 3 of period p. The warps of a program it deals to axes by how many neighbours these have
    # in memory; of several without any, Triton 3.6 takes the first and 3.7 the last, unless one is said to have 2: the
    # marks below say so of the first. Only the last axis decides how wide a load is. A sum loses the mark.
    worker = tl.program_id(1) * WARPS + tl.arange(0, WARPS)[:, None, None, None]
    step = tl.arange(0, STEPS)[None, :, None, None]
    tile = tl.arange(0, TILES)[None, None, :, None]
    place = tl.arange(0, 128)[None, None, None, :]
    p = (place // 4) % 4
    n = block * COLUMNS + tile * 32 + (place // 16) * 4 + place % 4
    word = ((worker * STEPS + step) * 4 + p) * WORDS
    word_at = tl.max_contiguous(word * N + n, (2, 1, 1, 4))
    # A period of the first step, and the first value of every part: their groups, if LINEAR.
    first = worker * (STEPS * 4) + p
    of_part = worker * (STEPS * 4 * VALUES) + tl.arange(0, PARTS)[None, :, None, None] * GROUP + place * 0
    zero_at = n + first * 0
    scale_at = n + of_part * 0
    if LINEAR:
        first = first * VALUES // GROUP
        of_part = of_part // GROUP
        zero_at = tl.max_contiguous(zero_at + first * N, (2, 1, 1, 4))
        scale_at = tl.max_contiguous(scale_at + of_part * N, (2, 1, 1, 4))
    # x has the axes (warp, step, ROWS/8, VALUES/J, place), the place being (row in eight, period, value). Rows that do
    # not exist are copies of the last, which nobody reads.
    xworker = tl.program_id(1) * WARPS + tl.arange(0, WARPS)[:, None, None, None, None]
    xstep = tl.arange(0, STEPS)[None, :, None, None, None]
    eights = tl.arange(0, ROWS // 8)[None, None, :, None, None]
    jh = tl.arange(0, VALUES // J)[None, None, None, :, None]
    xplace = tl.arange(0, 32 * J)[None, None, None, None, :]
    xp = (xplace // J) % 4
    xk = ((xworker * STEPS + xstep) * 4 + xp) * VALUES + jh * J + xplace % J
    row = tl.minimum(tl.program_id(2) * ROWS + eights * 8 + xplace // (4 * J), rows - 1)
    x_at = tl.max_contiguous(row * K + xk, (2, 1, 1, 1, J))
    words_ptr, scales_ptr, zeros_ptr, offset_ptr, bias_ptr = arrays_of_weight(
        program,
        words0_ptr, scales0_ptr, zeros0_ptr, offset0_ptr, bias0_ptr,
        words1_ptr, scales1_ptr, zeros1_ptr, offset1_ptr, bias1_ptr,
        words2_ptr, scales2_ptr, zeros2_ptr, offset2_ptr, bias2_ptr,
        layer_ptr, N, words, groups, END0, END1, END2, LAYER,
    )  # fmt: skip

    start = block % ROUNDS if ROTATE else 0
    round0 = _load_round(
        0, start, words_ptr, scales_ptr, zeros_ptr, offset_ptr, word_at, zero_at, scale_at, n, word, first, of_part,
        N, words, groups, VALUES, WORDS, GROUP, SPAN, OFFSET, EVEN, LINEAR, ROUNDS,
    )  # fmt: skip
    if AHEAD == 2:
        round1 = _load_round(
            1, _place(1, start, ROUNDS),
            words_ptr, scales_ptr, zeros_ptr, offset_ptr, word_at, zero_at, scale_at, n, word, first, of_part,
            N, words, groups, VALUES, WORDS, GROUP, SPAN, OFFSET, EVEN, LINEAR, ROUNDS,
        )  # fmt: skip
    if X_AHEAD > 0:
        x0 = _load_x(0, start, x_ptr, x_at, xk, K, VALUES, SPAN, EVEN, ROUNDS)
    if X_AHEAD == 2:
        x1 = _load_x(1, _place(1, start, ROUNDS), x_ptr, x_at, xk, K, VALUES, SPAN, EVEN, ROUNDS)
    total = tl.zeros((WARPS, COLUMNS, ROWS), tl.float32)
    for r in tl.range(0, ROUNDS, loop_unroll_factor=UNROLL):
        later = _load_round(
            r + AHEAD, _place(r + AHEAD, start, ROUNDS),
            words_ptr, scales_ptr, zeros_ptr, offset_ptr, word_at, zero_at, scale_at, n, word, first, of_part,
            N, words, groups, VALUES, WORDS, GROUP, SPAN, OFFSET, EVEN, LINEAR, ROUNDS,
        )  # fmt: skip
        x_later = _load_x(
            r + X_AHEAD, _place(r + X_AHEAD, start, ROUNDS), x_ptr, x_at, xk, K, VALUES, SPAN, EVEN, ROUNDS
        )  # fmt: skip
        w0, w1, w2, z, mu, scales = round0
        if AHEAD == 2:
            round0 = round1
            round1 = later
        else:
            round0 = later
        if X_AHEAD == 0:
            x = x_later
        elif X_AHEAD == 1:
            x = x0
            x0 = x_later
        else:
            x = x0
            x0 = x1
            x1 = x_later
        zero = zero_of(z.to(tl.uint32), BITS, BF16, INTERPRET)
        if OFFSET:
            mu = mu.to(tl.float32) if BITS == 8 and BF16 else two_halves(mu, BF16)
        w0 = w0.to(tl.uint32, bitcast=True)
        w1 = w1.to(tl.uint32, bitcast=True)
        w2 = w2.to(tl.uint32, bitcast=True)
        left = operand(w0, w1, w2, zero, mu, BITS, OFFSET, BF16, INTERPRET)
        # (warp, step, tile, a, p, column, half, pairs) -> (warp, (tile, column, a), (step, pairs, p, pair in 2, half))
        left = tl.reshape(left, (WARPS, STEPS, TILES, 8, 4, 4, 2, VALUES // 4, 2))
        left = tl.permute(left, (0, 2, 5, 3, 1, 7, 4, 8, 6))
        left = tl.reshape(left, (WARPS, COLUMNS, STEPS * 4 * VALUES))
        for part in tl.static_range(PARTS):
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
            s = tl.reshape(_of_part(scales, part, PARTS).to(tl.float32), (WARPS, TILES, 8, 4, 4))
            s = tl.reshape(tl.permute(s, (0, 1, 4, 2, 3)), (WARPS, COLUMNS, 1, 4, 1))
            s = tl.reshape(tl.broadcast_to(s, (WARPS, COLUMNS, ROWS // 8, 4, 2)), (WARPS, COLUMNS, ROWS))
            total += dot * s

    y = tl.sum(total, axis=0)
    m = tl.arange(0, COLUMNS)
    column = block * COLUMNS + (m // 32) * 32 + (m % 8) * 4 + (m // 8) % 4
    out = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column < N, other=0.0)
        y = plus_bias(y, bias[:, None], y_ptr.dtype.element_ty)
    at = y_ptr + (tl.program_id(1) * rows + out)[None, :] * N + column[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(out < rows)[None, :] & (column < N)[:, None])
