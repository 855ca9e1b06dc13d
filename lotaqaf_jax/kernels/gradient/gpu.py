"""The adapters' gradients on a GPU: which kernel runs, with which arguments. Equations: :mod:`lotaqaf_jax.ternary`.

With S = s * dW', c the offset's factor and means taken over the rows of a group, dD = S + c * mean(S), so that

    dA = dD @ B.T = P + c * mean(P),             P = S @ B.T
    dB = A.T @ dD = (A + c * mean(A)).T @ S

and two products with S are all that is taken of anything as large as the weight. With a window h over D (surrogate
"window"), h * S takes the place of S in P, and in what A multiplies; the means stay those of S.
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
from lotaqaf_jax.ternary import WINDOW_ABOVE, WINDOW_BELOW, WINDOW_WIDTH, Offset, Surrogate, offset_scale

__all__ = ["adapter_gradients", "fits_tiles"]


def fits_tiles(w: QuantizedWeight) -> bool:
    """Whether tiles lie in groups, or hold whole groups: consecutive rows, 16, 32, or a multiple of 64 of them."""
    return w.g_idx is None and (w.group_size in (-1, 16, 32) or w.group_size % 64 == 0)


def adapter_gradients(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    dweight: jax.Array,
    *,
    omega: float | jax.Array,
    offset: Offset,
    surrogate: Surrogate = "straight",
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
        surrogate: "straight" or "window".

    Returns:
        dA (in, rank) and dB (rank, out), float32.
    """
    left, right = gradient_blocks(*w.shape, dweight.dtype.itemsize)
    within = None if surrogate == "straight" else omega
    p = left_product(w, a, b, dweight, left, within=within)
    if offset == "none":
        return p, right_product(w, a, b, None, dweight, right, within=within)
    factor = (offset_scale(omega, offset) / w.group_rows()).astype(jnp.float32)
    mean = factor * w.group_sum(a.astype(jnp.float32))
    plain = p if within is None else left_product(w, a, b, dweight, left)
    q = right_product(w, a, b, mean, dweight, right, within=within)
    return p + w.spread(factor * w.group_sum(plain)), q


def left_product(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    dweight: jax.Array,
    blocks: GradientBlocks,
    *,
    within: float | jax.Array | None = None,
) -> jax.Array:
    """(h * s * dW') @ B.T, (in, rank) float32; h is 1, or the window of the threshold ``within``."""
    from lotaqaf_jax.kernels.gradient.triton import left_kernel

    n_in, n_out = w.shape
    rank = b.shape[0]
    (p,) = launch(
        left_kernel,
        dweight,
        w.scales,
        a.astype(dweight.dtype),
        b.astype(dweight.dtype),
        _omega(within),
        out=[jax.ShapeDtypeStruct((blocks.split, n_in, rank), jnp.float32)],
        grid=(-(-n_in // blocks.rows), blocks.split),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        fuse=True,
        **_sizes(w, rank, blocks, within),
        ROUNDS=-(-n_out // (blocks.columns * blocks.split)),
    )
    return p.sum(axis=0)


def right_product(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    mean: jax.Array | None,
    dweight: jax.Array,
    blocks: GradientBlocks,
    *,
    within: float | jax.Array | None = None,
) -> jax.Array:
    """A.T @ (h * s * dW') + mean.T @ (s * dW'), (rank, out) float32; ``mean`` (groups, rank), h as before."""
    from lotaqaf_jax.kernels.gradient.triton import right_kernel

    n_in, n_out = w.shape
    rank = a.shape[1]
    blocks = dataclasses.replace(blocks, rows=min(blocks.rows, _group(w)))  # a round lies in one group
    (q,) = launch(
        right_kernel,
        dweight,
        w.scales,
        a.astype(dweight.dtype),
        b.astype(dweight.dtype),
        jnp.zeros((1, 1), jnp.float32) if mean is None else mean,
        _omega(within),
        out=[jax.ShapeDtypeStruct((blocks.split, rank, n_out), jnp.float32)],
        grid=(-(-n_out // blocks.columns), blocks.split),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        fuse=True,
        **_sizes(w, rank, blocks, within),
        ROUNDS=-(-n_in // (blocks.rows * blocks.split)),
        MEAN=mean is not None,
    )
    return q.sum(axis=0)


def _omega(within: float | jax.Array | None) -> jax.Array:
    return jnp.asarray(1.0 if within is None else within, jnp.float32).reshape(1)


def _sizes(w: QuantizedWeight, rank: int, blocks: GradientBlocks, within: Any) -> dict[str, Any]:
    """What both kernels are told of sizes, and of the window."""
    window = {"WINDOW": within is not None, "WIDTH": WINDOW_WIDTH, "BELOW": WINDOW_BELOW, "ABOVE": WINDOW_ABOVE}
    sizes = {"K": w.shape[0], "N": w.shape[1], "GROUP": _group(w), "rank": rank, "INTERPRET": interpreted()}
    return sizes | window | {"RANK": padded(rank), "ROWS": blocks.rows, "COLUMNS": blocks.columns}


def _group(w: QuantizedWeight) -> int:
    """Rows of a group; of the only one as many as any tile has."""
    return 1 << 30 if w.group_size == -1 else w.group_size
