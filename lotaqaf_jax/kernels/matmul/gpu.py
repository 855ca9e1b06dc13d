"""The packed matmul on a GPU: which kernel runs, with which arguments. Equation: :func:`.matmul.reference`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.adjust.gpu import dequantized
from lotaqaf_jax.kernels.launch import interpreted, launch
from lotaqaf_jax.kernels.matmul import matmul as plain
from lotaqaf_jax.kernels.matmul.blocks import MatmulBlocks, matmul_blocks, period_of
from lotaqaf_jax.quant.packing import packed_size
from lotaqaf_jax.quant.weight import QuantizedWeight

__all__ = ["fused", "matmul"]


def matmul(x: jax.Array, w: QuantizedWeight, bias: jax.Array | None, layer: jax.Array | int | None) -> jax.Array:
    """x @ W + bias for one weight, or for one layer of a stack."""
    n_in, n_out = w.shape
    group = n_in if w.group_size == -1 else w.group_size
    blocks = None
    # A float32 x wants q - z + mu to more than the 16 bits of the kernel's operand.
    if w.g_idx is None and not (x.dtype == jnp.float32 and w.offset is not None):
        blocks = matmul_blocks(x.shape[0], n_in, n_out, w.bits, group)
    if blocks is None:
        w, bias = plain.layer_of(w, bias, layer)
        return plain.matmul(x, dequantized(w, x.dtype), bias)
    return fused(x, w, bias, layer, blocks)


def fused(
    x: jax.Array, w: QuantizedWeight, bias: jax.Array | None, layer: jax.Array | int | None, blocks: MatmulBlocks
) -> jax.Array:
    """The same, straight from the packed words, in programs of the size ``blocks`` says."""
    rows, n_in = x.shape
    n_out = w.shape[1]
    values, words = period_of(w.bits)
    group = n_in if w.group_size == -1 else w.group_size
    depth = 4 * values
    span = depth * blocks.steps * blocks.warps * blocks.split
    rounds = -(-n_in // span)
    split = blocks.split > 1
    (y,) = launch(
        _kernels().matmul_kernel,
        x,
        w.qweight,
        w.scales,
        w.zeros,
        w.scales if w.offset is None else w.offset,
        w.scales if bias is None or split else bias,
        jnp.zeros((1,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1),
        rows,
        out=[
            jax.ShapeDtypeStruct((blocks.split, rows, n_out), jnp.float32)
            if split
            else jax.ShapeDtypeStruct((rows, n_out), x.dtype)
        ],
        grid=(-(-n_out // (32 * blocks.tiles)), blocks.split, -(-rows // blocks.rows)),
        num_warps=blocks.warps,
        num_stages=1,
        fuse=True,
        # Sizes as constants: what divides them decides how wide loads are, and so how values lie in registers.
        K=n_in,
        N=n_out,
        words=packed_size(n_in, w.bits),
        groups=w.groups,
        BITS=w.bits,
        VALUES=values,
        WORDS=words,
        GROUP=group,
        PARTS=max(1, depth // group) if group < n_in else 1,
        OFFSET=w.offset is not None,
        BIAS=bias is not None and not split,
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
        EVEN=n_in == rounds * span and n_out % (32 * blocks.tiles) == 0,
        LINEAR=group >= n_in or span % group == 0,
        ROTATE=blocks.rotate,
        AHEAD=blocks.ahead,
    )
    if not split:
        return y
    y = y.sum(axis=0)
    if bias is not None:
        bias = bias if layer is None else jnp.take(bias, jnp.asarray(layer, jnp.int32).reshape(()), axis=0)
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def _kernels() -> Any:
    """The Triton kernel, imported only where it is used."""
    from lotaqaf_jax.kernels.matmul import triton

    return triton
