"""Triton kernel of the packed matmul for more than 16 rows: y = x @ s * (q - z + mu), the weights from their words.

Here x is too large for every warp to read all of it, as the warps of :mod:`.triton` do. Those of a program share it:
each has columns of its own and all k, W^T is the left operand, straight from registers, and x^T the right one, in
shared memory; on Hopper four warps multiply together (wgmma). Words, zeros, scales and x reach shared memory through
Triton's pipeline, rounds ahead, which costs no registers.

A lane's words are its fragments: lane 4a + p holds four neighbouring columns, 4a to 4a + 3, of period p. The columns of
the product are permuted to fit, and so is k, which within four periods runs over (pair, period, half): x has been
brought into that order before (:func:`.gpu.prepared`). Operands are made as :mod:`.operand` says; each group is summed
in float32 and then multiplied by its scale. None of this is asked of Triton: it follows from the axes the tensors are
given, and where Triton deals otherwise the result is the same and slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lotaqaf_jax.kernels.matmul.operand import operand, two_halves, zero_of
from lotaqaf_jax.kernels.matmul.weights import arrays_of_weight, of_weight, plus_bias

__all__ = ["many_rows_kernel"]


@triton.jit
def _product(left, x0, x1, x2, TERMS: tl.constexpr, INTERPRET: tl.constexpr):
    """left @ x^T, x being one term or the sum of three, of which the first is the smallest."""
    if INTERPRET:
        # The interpreter has no product of bfloat16.
        left = left.to(tl.float32)
        x0 = x0.to(tl.float32)
        x1 = x1.to(tl.float32)
        x2 = x2.to(tl.float32)
    out = tl.dot(left, tl.trans(x0), input_precision="ieee")
    if TERMS == 3:
        out = tl.dot(left, tl.trans(x1), out, input_precision="ieee")
        out = tl.dot(left, tl.trans(x2), out, input_precision="ieee")
    return out


@triton.jit
def _spread(s, ROWS: tl.constexpr):
    """Scales (columns, 4), the same four times, to (columns, ROWS): they lie where accumulators do, p among rows."""
    COLUMNS: tl.constexpr = s.shape[0]
    s = tl.broadcast_to(tl.reshape(s, (COLUMNS, 1, 4, 1)), (COLUMNS, ROWS // 8, 4, 2))
    return tl.reshape(s, (COLUMNS, ROWS))


@triton.jit
def _halves_of(t):
    """The upper and the lower half of a matrix."""
    M: tl.constexpr = t.shape[0]
    return tl.split(tl.permute(tl.reshape(t, (2, M // 2, t.shape[1])), (1, 2, 0)))


@triton.jit
def many_rows_kernel(
    x_ptr,
    words0_ptr, scales0_ptr, zeros0_ptr, offset0_ptr, bias0_ptr,
    words1_ptr, scales1_ptr, zeros1_ptr, offset1_ptr, bias1_ptr,
    words2_ptr, scales2_ptr, zeros2_ptr, offset2_ptr, bias2_ptr,
    layer_ptr,
    rows,
    y0_ptr, y1_ptr, y2_ptr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    words: tl.constexpr, groups: tl.constexpr,
    BITS: tl.constexpr, VALUES: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, LAYER: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr, ROUNDS: tl.constexpr,
    EVEN: tl.constexpr, TERMS: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows by 32*WARPS columns of y, over all k or, with SPLIT, a part of it.

    x is (TERMS, PARTS, rows in whole programs, k in as many rounds for each), zero where there is nothing; its terms
    add up to it. Weights are those of :func:`.triton.matmul_kernel`. All k takes ROUNDS rounds of STEPS steps of four
    periods. PARTS is 1 where a round lies in one group of GROUP rows; where a group is smaller than a step (then STEPS
    is 1), the number of groups in a step: x comes once for each, zero in the others. EVEN: rounds and columns cover the
    matrix exactly. With HALVES the columns are multiplied in two halves, so that half as many fresh accumulators are
    held at once.
    """
    COLUMNS: tl.constexpr = 32 * WARPS
    DEPTH: tl.constexpr = STEPS * 4 * VALUES
    OWN: tl.constexpr = (ROUNDS + SPLIT - 1) // SPLIT  # rounds of a program
    END0: tl.constexpr = (N0 + COLUMNS - 1) // COLUMNS
    END1: tl.constexpr = END0 + (N1 + COLUMNS - 1) // COLUMNS
    END2: tl.constexpr = END1 + (N2 + COLUMNS - 1) // COLUMNS
    # Programs that share words are neighbours.
    row = tl.program_id(0) * ROWS
    program = tl.program_id(1)
    start = tl.program_id(2) * OWN
    y_ptr = of_weight(program, y0_ptr, y1_ptr, y2_ptr, END0, END1, END2)
    if (N1 == N0 or N1 == 0) and (N2 == N0 or N2 == 0):
        N: tl.constexpr = N0
    else:
        N = of_weight(program, N0, N1, N2, END0, END1, END2)
    block = program - of_weight(program, 0, END0, END1, END0, END1, END2)
    words_ptr, scales_ptr, zeros_ptr, offset_ptr, bias_ptr = arrays_of_weight(
        program,
        words0_ptr, scales0_ptr, zeros0_ptr, offset0_ptr, bias0_ptr,
        words1_ptr, scales1_ptr, zeros1_ptr, offset1_ptr, bias1_ptr,
        words2_ptr, scales2_ptr, zeros2_ptr, offset2_ptr, bias2_ptr,
        layer_ptr, N, words, groups, END0, END1, END2, LAYER,
    )  # fmt: skip

    # Axes (step, warp, place). Triton deals the lanes to the last, four words to each, and the warps to the one before,
    # of which the mark says that it has 2 neighbours in memory. A sum of tensors loses the mark.
    step = tl.arange(0, STEPS)[:, None, None]
    warp = tl.arange(0, WARPS)[None, :, None]
    place = tl.arange(0, 128)[None, None, :]
    p = (place // 4) % 4
    n = block * COLUMNS + warp * 32 + (place // 16) * 4 + place % 4
    word = (step * 4 + p) * WORDS
    word_at = tl.max_contiguous(word * N + n, (1, 2, 4))
    scale_at = tl.max_contiguous(n, (1, 2, 4))
    part_of_p = p // (4 // PARTS)
    zero_at = scale_at if PARTS == 1 else tl.max_contiguous(n + part_of_p * N, (1, 2, 4))
    K: tl.constexpr = SPLIT * OWN * DEPTH
    x_at = tl.arange(0, ROWS)[:, None] * K + tl.arange(0, DEPTH)[None, :]
    x_ptr += row * K + start * DEPTH
    x_part = tl.num_programs(0) * (ROWS * K)

    if HALVES:
        total0 = tl.zeros((COLUMNS // 2, ROWS), tl.float32)
        total1 = tl.zeros((COLUMNS // 2, ROWS), tl.float32)
    else:
        total = tl.zeros((COLUMNS, ROWS), tl.float32)
    # The number of stages is given here, so that loads that are not the product's go through the pipeline too.
    for i in tl.range(0, OWN, num_stages=STAGES):
        # Rounds that are not there repeat the last, with zeros for x.
        r = tl.minimum(start + i, ROUNDS - 1)
        group = r * DEPTH // GROUP
        words_now = words_ptr + r * (STEPS * 4 * WORDS) * N
        zeros_now = zeros_ptr + group * N
        offset_now = offset_ptr + group * N
        w_mask = None
        w1_mask = None
        w2_mask = None
        z_mask = None
        other = None
        if not EVEN:
            # What lies outside meets a zero of x or a scale of 0, and must be finite.
            at = r * (STEPS * 4 * WORDS) + word
            w_mask = (at < words) & (n < N)
            w1_mask = (at + 1 < words) & (n < N)
            w2_mask = (at + 2 < words) & (n < N)
            z_mask = (group + part_of_p < groups) & (n < N)
            other = 0
        w0 = tl.load(words_now + word_at, mask=w_mask, other=other)
        w1 = w0
        w2 = w0
        if WORDS > 1:
            w1 = tl.load(words_now + N + word_at, mask=w1_mask, other=other)
        if WORDS > 2:
            w2 = tl.load(words_now + 2 * N + word_at, mask=w2_mask, other=other)
        z = tl.load(zeros_now + zero_at, mask=z_mask, other=other)
        mu = z
        if OFFSET:
            mu = tl.load(offset_now + zero_at, mask=z_mask, other=other)
            mu = mu.to(tl.float32) if BITS == 8 and BF16 else two_halves(mu, BF16)
        zero = zero_of(z.to(tl.uint32), BITS, BF16, INTERPRET)
        w0 = w0.to(tl.uint32, bitcast=True)
        w1 = w1.to(tl.uint32, bitcast=True)
        w2 = w2.to(tl.uint32, bitcast=True)
        left = operand(w0, w1, w2, zero, mu, BITS, OFFSET, BF16, INTERPRET)
        # (step, warp, a, p, column high, low, half, pairs) -> ((column high, warp, column low, a), (step, pairs, p,
        # half)): a lane has rows a and a + 8 of a fragment, and k of 2p, 2p + 1, 2p + 8 and 2p + 9.
        left = tl.reshape(left, (STEPS, WARPS, 8, 4, 2, 2, 2, VALUES // 2))
        left = tl.reshape(tl.permute(left, (4, 1, 5, 2, 0, 7, 3, 6)), (COLUMNS, DEPTH))
        if HALVES:
            left0, left1 = _halves_of(left)
        for part in tl.static_range(PARTS):
            x_now = x_ptr + part * x_part + i * DEPTH
            x0 = tl.load(x_now + x_at)
            x1 = x0
            x2 = x0
            if TERMS == 3:
                x1 = tl.load(x_now + PARTS * x_part + x_at)
                x2 = tl.load(x_now + 2 * PARTS * x_part + x_at)
            scales_now = scales_ptr + (group + part) * N
            s_mask = None
            if not EVEN:
                s_mask = (group + part < groups) & (n < N)
            s = tl.load(scales_now + scale_at, mask=s_mask, other=other).to(tl.float32)
            s = tl.reshape(tl.permute(tl.reshape(s, (WARPS, 8, 4, 2, 2)), (3, 0, 4, 1, 2)), (COLUMNS, 4))
            if HALVES:
                s0, s1 = _halves_of(s)
                total0 += _product(left0, x0, x1, x2, TERMS, INTERPRET) * _spread(s0, ROWS)
                total1 += _product(left1, x0, x1, x2, TERMS, INTERPRET) * _spread(s1, ROWS)
            else:
                total += _product(left, x0, x1, x2, TERMS, INTERPRET) * _spread(s, ROWS)

    y = tl.permute(tl.join(total0, total1), (2, 0, 1)) if HALVES else total
    y = tl.permute(tl.reshape(y, (2, WARPS, 2, 8, ROWS)), (4, 1, 3, 0, 2))
    y = tl.reshape(y, (ROWS, COLUMNS))
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    out = row + tl.arange(0, ROWS)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column < N, other=0.0)
        y = plus_bias(y, bias[None, :], y_ptr.dtype.element_ty)
    at = y_ptr + (tl.program_id(2) * rows + out)[:, None] * N + column[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(out < rows)[:, None] & (column < N)[None, :])
