"""The adapters' gradients on a GPU: which kernel runs, with which arguments. Equations: :mod:`lotaqaf_jax.ternary`.

With S = s * dW', c the offset's factor and means taken over the rows of a group, dD = S + c * mean(S), so that

    dA = dD @ B.T = P + c * mean(P),             P = S @ B.T
    dB = A.T @ dD = (A + c * mean(A)).T @ S

and two products with S are all that is taken of anything as large as the weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.gradient.blocks import GradientBlocks, gradient_blocks
from lotaqaf_jax.kernels.launch import interpreted, launch
from lotaqaf_jax.kernels.sizes import padded
from lotaqaf_jax.quant.weight import QuantizedWeight
from lotaqaf_jax.ternary import Offset, offset_scale

__all__ = ["adapter_gradients", "fits_tiles"]


def fits_tiles(w: QuantizedWeight) -> bool:
    """Whether tiles lie in groups, or hold whole groups: consecutive rows, 16, 32, or a multiple of 64 of them."""
    return w.g_idx is None and (w.group_size in (-1, 16, 32) or w.group_size % 64 == 0)


def adapter_gradients(
    w: QuantizedWeight, a: jax.Array, b: jax.Array, dweight: jax.Array, *, omega: float, offset: Offset
) -> tuple[jax.Array, jax.Array]:
    """:func:`lotaqaf_jax.ternary.adapter_gradients` for weights that fit tiles.

    In dA, S is rounded to the type of ``dweight`` before it is multiplied, in dB the mean of A; sums are float32.

    Args:
        w: the quantised weight, without its adapters.
        a: (in, rank), values in {-1, 0, 1}.
        b: (rank, out), likewise.
        dweight: gradient of the loss at the adjusted weight, (in, out).
        omega: threshold.
        offset: offset rule.

    Returns:
        dA (in, rank) and dB (rank, out), float32.
    """
    left, right = gradient_blocks(*w.shape, dweight.dtype.itemsize)
    p = left_product(w, b, dweight, left)
    if offset == "none":
        return p, right_product(w, a, None, dweight, right)
    factor = (offset_scale(omega, offset) / w.group_rows()).astype(jnp.float32)
    mean = factor * w.group_sum(a.astype(jnp.float32))
    return p + w.spread(factor * w.group_sum(p)), right_product(w, a, mean, dweight, right)


def left_product(w: QuantizedWeight, b: jax.Array, dweight: jax.Array, blocks: GradientBlocks) -> jax.Array:
    """(s * dW') @ B.T, (in, rank) float32."""
    from lotaqaf_jax.kernels.gradient.triton import left_kernel

    n_in, n_out = w.shape
    rank = b.shape[0]
    (p,) = launch(
        left_kernel,
        dweight,
        w.scales,
        b.astype(dweight.dtype),
        out=[jax.ShapeDtypeStruct((blocks.split, n_in, rank), jnp.float32)],
        grid=(-(-n_in // blocks.rows), blocks.split),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        fuse=True,
        **_sizes(w, rank, blocks),
        ROUNDS=-(-n_out // (blocks.columns * blocks.split)),
    )
    return p.sum(axis=0)


def right_product(
    w: QuantizedWeight, a: jax.Array, mean: jax.Array | None, dweight: jax.Array, blocks: GradientBlocks
) -> jax.Array:
    """(A + mean).T @ (s * dW'), (rank, out) float32; ``mean`` (groups, rank)."""
    from lotaqaf_jax.kernels.gradient.triton import right_kernel

    n_in, n_out = w.shape
    rank = a.shape[1]
    blocks = dataclasses.replace(blocks, rows=min(blocks.rows, _group(w)))  # a round lies in one group
    (q,) = launch(
        right_kernel,
        dweight,
        w.scales,
        a.astype(dweight.dtype),
        jnp.zeros((1, 1), jnp.float32) if mean is None else mean,
        out=[jax.ShapeDtypeStruct((blocks.split, rank, n_out), jnp.float32)],
        grid=(-(-n_out // blocks.columns), blocks.split),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        fuse=True,
        **_sizes(w, rank, blocks),
        ROUNDS=-(-n_in // (blocks.rows * blocks.split)),
        MEAN=mean is not None,
    )
    return q.sum(axis=0)


def _sizes(w: QuantizedWeight, rank: int, blocks: GradientBlocks) -> dict[str, Any]:
    """What both kernels are told of sizes."""
    sizes = {"K": w.shape[0], "N": w.shape[1], "GROUP": _group(w), "rank": rank, "INTERPRET": interpreted()}
    return sizes | {"RANK": padded(rank), "ROWS": blocks.rows, "COLUMNS": blocks.columns}


def _group(w: QuantizedWeight) -> int:
    """Rows of a group; of the only one as many as any tile has."""
    return 1 << 30 if w.group_size == -1 else w.group_size
