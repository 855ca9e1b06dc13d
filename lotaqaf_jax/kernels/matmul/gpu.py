"""The packed matmul on a GPU: which kernel runs, with which arguments. Equation: :func:`.matmul.reference`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.adjust.gpu import dequantized
from lotaqaf_jax.kernels.launch import interpreted, launch
from lotaqaf_jax.kernels.matmul import matmul as plain
from lotaqaf_jax.kernels.matmul.blocks import FewRows, ManyRows, column_blocks, matmul_blocks, parts_of, period_of
from lotaqaf_jax.kernels.parts import added
from lotaqaf_jax.quant.packing import packed_size
from lotaqaf_jax.quant.weight import QuantizedWeight, group_length

__all__ = ["MOST_WEIGHTS", "fused", "matmul", "prepared"]

MOST_WEIGHTS = 3
"""What a kernel takes in one launch."""

Biases = Sequence[jax.Array | None]
_Launch = tuple[Any, jax.Array, dict[str, Any]]
"""The kernel, x as it takes it, and what it wants beside what both want."""


def matmul(
    x: jax.Array,
    weights: Sequence[QuantizedWeight],
    biases: Biases,
    layer: jax.Array | int | None,
    whole: bool = True,
) -> tuple[jax.Array, ...]:
    """x @ W + bias for every weight, or for one layer of every stack; in one launch where they are alike.

    Without ``whole``, and without a bias, a product that programs share stays in its parts, (parts, rows, out) float32.
    """
    kinds = {_kind(w, bias) for w, bias in zip(weights, biases, strict=True)}
    if len(kinds) > 1 or len(weights) > MOST_WEIGHTS:
        return tuple(matmul(x, (w,), (bias,), layer, whole)[0] for w, bias in zip(weights, biases, strict=True))
    w = weights[0]
    blocks = None
    # A float32 x wants q - z + mu to more than the 16 bits of the kernel's operand.
    if w.g_idx is None and not (x.dtype == jnp.float32 and w.offset is not None):
        widths = [w.shape[1] for w in weights]
        blocks = matmul_blocks(x.shape[0], w.shape[0], widths, w.bits, _rows_of_group(w), _terms(x))
    if blocks is not None:
        return fused(x, weights, biases, layer, blocks, whole)
    layers = [plain.layer_of(w, bias, layer) for w, bias in zip(weights, biases, strict=True)]
    return tuple(plain.matmul(x, dequantized(w, x.dtype), bias) for w, bias in layers)


def fused(
    x: jax.Array,
    weights: Sequence[QuantizedWeight],
    biases: Biases,
    layer: jax.Array | int | None,
    blocks: FewRows | ManyRows,
    whole: bool = True,
) -> tuple[jax.Array, ...]:
    """The same for weights that are alike, straight from the packed words, in programs of the size ``blocks`` says.

    A column's sum runs in the order that ``blocks`` says, whatever other weights there are.
    """
    rows, n_in = x.shape
    w = weights[0]
    absent = MOST_WEIGHTS - len(weights)
    widths = [one.shape[1] for one in weights]
    n0, n1, n2 = widths + [0] * absent
    values, words = period_of(w.bits)
    split = blocks.split > 1
    arrays = [_arrays(one, None if split else bias) for one, bias in zip(weights, biases, strict=True)]
    shapes = [(blocks.split, rows, n_out) if split else (rows, n_out) for n_out in widths]
    if isinstance(blocks, FewRows):
        kernel, given, settings = _few_rows(x, w, widths, blocks)
    else:
        kernel, given, settings = _many_rows(x, w, widths, blocks)
    ys = launch(
        kernel,
        given,
        # The place of a weight that is not there is taken by the first, and its output is a single number.
        *itertools.chain(*arrays, *arrays[:1] * absent),
        jnp.zeros((1,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1),
        rows,
        out=[jax.ShapeDtypeStruct(s, jnp.float32 if split else x.dtype) for s in (*shapes, *[(1,)] * absent)],
        num_warps=blocks.warps,
        fuse=True,
        # Sizes as constants: what divides them decides how wide loads are, and so how values lie in registers.
        N0=n0,
        N1=n1,
        N2=n2,
        words=packed_size(n_in, w.bits),
        groups=w.groups,
        BITS=w.bits,
        VALUES=values,
        WORDS=words,
        GROUP=_rows_of_group(w),
        PARTS=parts_of(n_in, w.bits, _rows_of_group(w)),
        OFFSET=w.offset is not None,
        BIAS=biases[0] is not None and not split,
        LAYER=layer is not None,
        BF16=x.dtype != jnp.float16,
        INTERPRET=interpreted(),
        ROWS=blocks.rows,
        WARPS=blocks.warps,
        STEPS=blocks.steps,
        SPLIT=blocks.split,
        **settings,
    )
    ys = ys[: len(weights)]
    if not split or not (whole or biases[0] is not None):
        return tuple(ys)
    return tuple(_whole(y, bias, layer, x.dtype) for y, bias in zip(ys, biases, strict=True))


def _few_rows(x: jax.Array, w: QuantizedWeight, widths: Sequence[int], blocks: FewRows) -> _Launch:
    """The kernel whose warps share k."""
    from lotaqaf_jax.kernels.matmul.triton import matmul_kernel

    (rows, n_in), group = x.shape, _rows_of_group(w)
    columns = 32 * blocks.tiles
    span = 4 * period_of(w.bits)[0] * blocks.steps * blocks.warps * blocks.split
    rounds = -(-n_in // span)
    settings = {
        "grid": (column_blocks(widths, columns), blocks.split, -(-rows // blocks.rows)),
        "num_stages": 1,
        "K": n_in,
        "TILES": blocks.tiles,
        "X_AHEAD": blocks.x_ahead,
        "UNROLL": blocks.unroll,
        "ROUNDS": rounds,
        "EVEN": n_in == rounds * span and not any(n_out % columns for n_out in widths),
        "LINEAR": group >= n_in or span % group == 0,
        "ROTATE": blocks.rotate,
        "AHEAD": blocks.ahead,
    }
    return matmul_kernel, x, settings


def _many_rows(x: jax.Array, w: QuantizedWeight, widths: Sequence[int], blocks: ManyRows) -> _Launch:
    """The kernel whose warps share x."""
    from lotaqaf_jax.kernels.matmul.many_rows import many_rows_kernel

    rows, n_in = x.shape
    columns = 32 * blocks.warps
    depth = 4 * period_of(w.bits)[0] * blocks.steps
    rounds = -(-n_in // depth)
    programs = -(-rows // blocks.rows)
    settings = {
        "grid": (programs, column_blocks(widths, columns), blocks.split),
        "num_stages": blocks.stages,
        "registers": blocks.registers,
        "ROUNDS": rounds,
        "EVEN": n_in == rounds * depth and not any(n_out % columns for n_out in widths),
        "TERMS": _terms(x),
        "HALVES": blocks.halves,
        "STAGES": blocks.stages,
    }
    shape = (programs * blocks.rows, -(-rounds // blocks.split) * blocks.split * depth)
    return many_rows_kernel, prepared(x, w.bits, parts_of(n_in, w.bits, _rows_of_group(w)), shape), settings


def prepared(x: jax.Array, bits: int, parts: int, shape: tuple[int, int]) -> jax.Array:
    """x as the kernel for many rows wants it: (terms, parts, rows, in), 16 bit.

    Args:
        x: (rows, in).
        bits: of the weights. Within four periods of the bitstream k is reordered to (pair, period, half).
        parts: groups in four periods. Part i is x in the i-th of them, and zero in the others.
        shape: (rows, in) of the result, filled up with zeros.

    Returns:
        x as one term; or a float32 x as three of 8 bits each, whose sum it is, the smallest first.
    """
    x = jnp.pad(x, [(0, whole - size) for whole, size in zip(shape, x.shape, strict=True)])
    values, _ = period_of(bits)
    # A half is 16 bits; of 8-bit values there are two in each, and two words in a period.
    inner = (2, 2, 2) if bits == 8 else (1, 2, values // 2)
    x = x.reshape(shape[0], -1, 4, *inner).transpose(0, 1, 3, 5, 2, 4)
    x = jnp.stack([x]) if x.dtype != jnp.float32 else jnp.stack(_three_terms(x))
    period = jnp.arange(4)[:, None]
    masked = [x if parts == 1 else jnp.where(period // (4 // parts) == part, x, 0) for part in range(parts)]
    return jnp.stack(masked, axis=1).reshape(-1, parts, *shape)


def _three_terms(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 whose sum is x in float32, the smallest first."""

    def head(value: jax.Array) -> jax.Array:
        # A conversion there and back may be left out by XLA, this may not.
        return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)

    high = head(x)
    middle = head(x - high)
    return [term.astype(jnp.bfloat16) for term in (x - high - middle, middle, high)]


def _terms(x: jax.Array) -> int:
    """How many 16-bit numbers the kernel for many rows takes x for."""
    return 3 if x.dtype == jnp.float32 else 1


def _whole(y: jax.Array, bias: jax.Array | None, layer: jax.Array | int | None, dtype: Any) -> jax.Array:
    """The sum of parts (parts, rows, out), plus the bias."""
    y = added(y, dtype)
    if bias is not None:
        bias = bias if layer is None else jnp.take(bias, jnp.asarray(layer, jnp.int32).reshape(()), axis=0)
        y = y + bias.astype(dtype)
    return y


def _kind(w: QuantizedWeight, bias: jax.Array | None) -> Any:
    """What weights of one launch have in common."""
    types = [None if array is None else array.dtype for array in (w.scales, w.offset, bias)]
    return w.shape[0], w.bits, w.group_size, w.g_idx is None, *types


def _arrays(w: QuantizedWeight, bias: jax.Array | None) -> tuple[jax.Array, ...]:
    """Words, scales, zeros, offset and bias of one weight; the scales instead of what is not there and not read."""
    return w.qweight, w.scales, w.zeros, w.scales if w.offset is None else w.offset, w.scales if bias is None else bias


def _rows_of_group(w: QuantizedWeight) -> int:
    return group_length(w.shape[0], w.group_size)
