"""The left operand of the packed matmul, W^T, made from words in registers: what its two kernels share.

A lane holds whole periods of a column. Every period is a set of pairs (value i, value i + VALUES/2) that lie 16 bits
apart, so that one shift, one logical operation and one addition of packed halves make two operands. An integer becomes
a float by becoming the low bits of a mantissa (128 + q in bfloat16, 1024 + q in float16), from which 128 + z is
subtracted, exactly; nothing but q - z + mu is rounded to 16 bits, and that only where there is an offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lotaqaf_jax.kernels.words import neighbours

__all__ = ["operand", "two_halves", "zero_of"]


@triton.jit
def _halves(w0, w1, w2, i: tl.constexpr, BITS: tl.constexpr):
    """Values i and i + VALUES/2 of every period, in the low bits of the halves of a word, which has other bits too."""
    first: tl.constexpr = (i * BITS) // 16
    shift: tl.constexpr = (i * BITS) % 16
    # Word k holds the bits 16k to 16k + 15 of both halves of the period.
    low, high = neighbours(w0, w1, w2, first)
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


@triton.constexpr_function
def _steps_assembly(bf16, offset):
    """PTX of :func:`_packed_steps`. $0 and $1 the halves; $2 the word, $3 mask, $4 exponent, $5 zero, $6 mu."""
    # bfloat16 has no addition of its own before Hopper: a product with one, and a sum.
    add = "fma.rn.bf16x2 t, t, one, " if bf16 else "add.rn.f16x2 t, t, "
    return f"""{{
        .reg .b32 t, one;
        mov.b32 one, 0x3F803F80;
        lop3.b32 t, $2, $3, $4, 0xEA;
        {add}$5;
        {add + "$6;" if offset else ""}
        mov.b32 {{$0, $1}}, t;
    }}"""


@triton.jit
def _packed_steps(v, zero, mu, BITS: tl.constexpr, OFFSET: tl.constexpr, BF16: tl.constexpr):
    """Two halves at a time: mask, set the exponent, subtract 128 + z (``zero`` is its negative), add mu."""
    mask = tl.full((1,), (2**BITS - 1) * 0x10001, tl.uint32)
    exponent = tl.full((1,), 0x43004300 if BF16 else 0x64006400, tl.uint32)
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if OFFSET:
        low, high = tl.inline_asm_elementwise(
            _steps_assembly(BF16, True), "=h,=h,r,r,r,r,r",
            [v, mask, exponent, zero, mu], dtype=(tl.uint16, tl.uint16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            _steps_assembly(BF16, False), "=h,=h,r,r,r,r",
            [v, mask, exponent, zero], dtype=(tl.uint16, tl.uint16), is_pure=True, pack=1,
        )  # fmt: skip
    return low.to(dtype, bitcast=True), high.to(dtype, bitcast=True)


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
def operand(
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
def zero_of(z, BITS: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr):
    """What takes z from a value of :func:`_pair`: -(128 + z) or -(1024 + z) twice, or 2**23 + z in float32.

    One instruction sets the bytes around z. It is declared impure for what Triton makes of that: it chooses the order
    of k inside a fragment by the narrowest load it finds behind an operand, and is not to find that of z.
    """
    if BITS == 8 and BF16:
        if INTERPRET:
            out = z | 0x4B000000
        else:
            out = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, 0x4B, 0x4550;", "=r,r", [z], dtype=tl.uint32, is_pure=False, pack=1
            )
        out = out.to(tl.float32, bitcast=True)
    elif INTERPRET:
        out = z * 0x10001 | (0xC300C300 if BF16 else 0xE400E400)
    elif BF16:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0xC3, 0x4040;", "=r,r", [z], dtype=tl.uint32, is_pure=False, pack=1
        )
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0xE4, 0x4040;", "=r,r", [z], dtype=tl.uint32, is_pure=False, pack=1
        )
    return out


@triton.jit
def two_halves(value, BF16: tl.constexpr):
    """A float twice in the halves of a word."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    return value.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001
