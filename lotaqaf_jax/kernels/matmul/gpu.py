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
from lotaqaf_jax.kernels.matmul.blocks import MatmulBlocks, matmul_blocks, period_of
from lotaqaf_jax.quant.packing import packed_size
from lotaqaf_jax.quant.weight import QuantizedWeight, group_length

__all__ = ["MOST_WEIGHTS", "fused", "matmul"]

MOST_WEIGHTS = 3
"""What the kernel takes in one launch."""

Biases = Sequence[jax.Array | None]


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
        blocks = matmul_blocks(x.shape[0], w.shape[0], [w.shape[1] for w in weights], w.bits, _rows_of_group(w))
    if blocks is not None:
        return fused(x, weights, biases, layer, blocks, whole)
    layers = [plain.layer_of(w, bias, layer) for w, bias in zip(weights, biases, strict=True)]
    return tuple(plain.matmul(x, dequantized(w, x.dtype), bias) for w, bias in layers)


def fused(
    x: jax.Array,
    weights: Sequence[QuantizedWeight],
    biases: Biases,
    layer: jax.Array | int | None,
    blocks: MatmulBlocks,
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
    group = _rows_of_group(w)
    depth = 4 * values
    span = depth * blocks.steps * blocks.warps * blocks.split
    rounds = -(-n_in // span)
    split = blocks.split > 1
    arrays = [_arrays(one, None if split else bias) for one, bias in zip(weights, biases, strict=True)]
    shapes = [(blocks.split, rows, n_out) if split else (rows, n_out) for n_out in widths]
    ys = launch(
        _kernels().matmul_kernel,
        x,
        # The place of a weight that is not there is taken by the first, and its output is a single number.
        *itertools.chain(*arrays, *arrays[:1] * absent),
        jnp.zeros((1,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1),
        rows,
        out=[jax.ShapeDtypeStruct(s, jnp.float32 if split else x.dtype) for s in (*shapes, *[(1,)] * absent)],
        grid=(sum(-(-n_out // (32 * blocks.tiles)) for n_out in widths), blocks.split, -(-rows // blocks.rows)),
        num_warps=blocks.warps,
        num_stages=1,
        fuse=True,
        # Sizes as constants: what divides them decides how wide loads are, and so how values lie in registers.
        K=n_in,
        N0=n0,
        N1=n1,
        N2=n2,
        words=packed_size(n_in, w.bits),
        groups=w.groups,
        BITS=w.bits,
        VALUES=values,
        WORDS=words,
        GROUP=group,
        PARTS=max(1, depth // group) if group < n_in else 1,
        OFFSET=w.offset is not None,
        BIAS=biases[0] is not None and not split,
        LAYER=layer is not None,
        BF16=x.dtype != jnp.float16,
        INTERPRET=interpreted(),
        ROWS=blocks.rows,
        TILES=blocks.tiles,
        WARPS=blocks.warps,
        STEPS=blocks.steps,
        SPLIT=blocks.split,
        X_AHEAD=blocks.x_ahead,
        UNROLL=blocks.unroll,
        ROUNDS=rounds,
        EVEN=n_in == rounds * span and not any(n_out % (32 * blocks.tiles) for n_out in widths),
        LINEAR=group >= n_in or span % group == 0,
        ROTATE=blocks.rotate,
        AHEAD=blocks.ahead,
    )
    ys = ys[: len(weights)]
    if not split or not (whole or biases[0] is not None):
        return tuple(ys)
    return tuple(_whole(y, bias, layer, x.dtype) for y, bias in zip(ys, biases, strict=True))


def _whole(y: jax.Array, bias: jax.Array | None, layer: jax.Array | int | None, dtype: Any) -> jax.Array:
    """The sum of parts (parts, rows, out), plus the bias."""
    y = y.sum(axis=0).astype(dtype)
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


def _kernels() -> Any:
    """The Triton kernel, imported only where it is used."""
    from lotaqaf_jax.kernels.matmul import triton

    return triton
