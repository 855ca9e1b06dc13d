"""The arithmetic of QA-LoRA: a low-rank change that is the same for all rows of a group, hence a shift of zero points.

    y  = x @ W + c * pool(x) @ (A @ B)            A (groups, rank), B (rank, out), c = alpha / rank
    pool(x)[.., g] = sum of x over the rows of group g                pool="sum"
                     mean of x over them                              pool="mean"

Since W = scales * (q - zeros) has one scale and one zero point for each group and output, that is a product with

    W' = scales * (q - zeros + mu),   mu = c * (A @ B) / scales       (pool="mean": divided by the group's rows too)

with the integers as they are: the merge is mu, the fraction of a step by which zero points move. It needs no equal and
no consecutive groups: act-order and a partial last group are served.

Source: QA-LoRA, arXiv 2309.14717, Algorithm 1, which is pool="sum" (average pooling, times the rows of a group); "mean"
is its authors' code, which divides by the rows when it merges. They are the same family of functions, but a step of the
optimizer is as many times smaller with "mean" as a group has rows.

What is trained is what is shipped: here too the forward pass multiplies x by W' itself, with mu rounded to the type it
is stored in, and not by W and by the low-rank product apart. The change that is trained and shipped, scales * mu, is
that of the first equation up to the rounding of mu, and nothing is rounded after training. A @ B is a sum of products
that are not exact, so its order is written out in :func:`_product`, for every program to give the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant.weight import QuantizedWeight

__all__ = ["Pool", "adapter_gradients", "check_pool", "group_offset", "merge"]

Pool = Literal["sum", "mean"]

_UNROLL = 16  # products added in one fused pass over the sum


def check_pool(pool: str) -> None:
    """Check the name of a pool.

    Raises:
        ConfigError: neither "sum" nor "mean".
    """
    if pool not in get_args(Pool):
        raise ConfigError(f"pool: found {pool!r}, expected one of {get_args(Pool)}.")


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A @ B in float32, summed from the first to the last of the rank, whatever program it is part of.

    A matrix product may sum in any order, and does so in other orders in other programs. Here every product is rounded
    to 22 of its 23 bits, which keeps compilers from contracting it with the sum (see :func:`lotaqaf_jax.ternary._mu`).
    It is small: of the size of the scales.
    """

    def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        column, row = pair
        product = jax.lax.reduce_precision(column[:, None] * row[None, :], exponent_bits=8, mantissa_bits=22)
        return total + product, None

    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    nothing = jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
    return jax.lax.scan(add, nothing, (a.T, b), unroll=min(_UNROLL, len(b)))[0]


def _factor(w: QuantizedWeight, scale: float, pool: str) -> jax.Array:
    """What A @ B is multiplied by to be added to the weight: c, or c / rows; (groups, 1) float32."""
    rows = w.group_rows() if pool == "mean" else jnp.ones((w.groups, 1), jnp.float32)
    return jax.lax.reduce_precision(jnp.float32(scale) / rows, exponent_bits=8, mantissa_bits=22)


def group_offset(
    w: QuantizedWeight, a: jax.Array, b: jax.Array, *, scale: float, pool: Pool = "sum", offset_dtype: Any = jnp.float32
) -> jax.Array:
    """mu = c * (A @ B) / scales, in steps of the grid and in the type it is stored in.

    A group whose scale is 0 has no steps: its mu is 0, and its weights stay 0.

    Args:
        w: the quantised weight (in, out), without an offset of its own.
        a: (groups, rank) float.
        b: (rank, out) float.
        scale: c = alpha / rank.
        pool: "sum" or "mean".
        offset_dtype: float32, bfloat16 or float16.

    Returns:
        (groups, out) of ``offset_dtype``.

    Raises:
        ValueError: shapes that do not fit, or a weight that already has an offset.

    Source: QA-LoRA, arXiv 2309.14717, Algorithm 1; there it is subtracted from the zero points.
    """
    _check_shapes(w, a, b)
    steps = w.scales.astype(jnp.float32)
    # No division but the reciprocal, and each value of several roundings behind one that no compiler may undo.
    inverse = jax.lax.reduce_precision(1.0 / jnp.where(steps == 0, 1.0, steps), exponent_bits=8, mantissa_bits=22)
    per_step = jax.lax.reduce_precision(_factor(w, scale, pool) * inverse, exponent_bits=8, mantissa_bits=22)
    kept = jnp.finfo(offset_dtype)
    mu = jax.lax.reduce_precision(_product(a, b) * per_step, exponent_bits=kept.nexp, mantissa_bits=min(kept.nmant, 22))
    # One zero, not two: whether a sum of zeros is -0 is for the compiler to say.
    mu = jnp.where((steps == 0) | (mu == 0), 0.0, mu)
    return jax.lax.optimization_barrier(mu.astype(offset_dtype))


def merge(
    w: QuantizedWeight, a: jax.Array, b: jax.Array, *, scale: float, pool: Pool = "sum", offset_dtype: Any = jnp.float32
) -> QuantizedWeight:
    """The weight with mu as its ``offset``, the integers as they are. Arguments as :func:`group_offset`."""
    return dataclasses.replace(w, offset=group_offset(w, a, b, scale=scale, pool=pool, offset_dtype=offset_dtype))


def adapter_gradients(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    x: jax.Array,
    dy: jax.Array,
    *,
    scale: float,
    pool: Pool = "sum",
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the adapters, the rounding of mu taken as the identity; nothing of the weight's size is made.

        dD = c * groupsum(x).T @ dy,   0 where the scale is 0         (pool="mean": divided by the group's rows too)
        dA = dD @ B.T,   dB = A.T @ dD

    Args:
        w: the quantised weight (in, out).
        a: (groups, rank) float.
        b: (rank, out) float.
        x: (rows, in).
        dy: (rows, out), the gradient of y.
        scale: c = alpha / rank.
        pool: "sum" or "mean".

    Returns:
        dA (groups, rank) and dB (rank, out), float32.
    """
    exact = functools.partial(
        jax.lax.dot_general, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    dd = exact(_group_sums(w, x), dy, (((1,), (0,)), ((), ()))) * _factor(w, scale, pool)
    dd = jnp.where(w.scales == 0, 0.0, dd)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return exact(dd, b, (((1,), (1,)), ((), ()))), exact(a, dd, (((0,), (0,)), ((), ())))


def _group_sums(w: QuantizedWeight, x: jax.Array) -> jax.Array:
    """Sums of x (rows, in) over the inputs of each group, (groups, rows), in the type of x."""
    if w.g_idx is None:
        return w.group_sum(x.T.astype(jnp.float32)).astype(x.dtype)
    # A product with ones and zeros rather than a scatter, whose sums a GPU makes in any order.
    member = (w.g_idx == jnp.arange(w.groups)[:, None]).astype(x.dtype)
    return jax.lax.dot_general(member, x, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def _check_shapes(w: QuantizedWeight, a: jax.Array, b: jax.Array) -> None:
    rank = a.shape[-1]
    if a.shape != (w.groups, rank) or b.shape != (rank, w.shape[1]):
        raise ValueError(
            f"adapters of a weight {w.shape} in {w.groups} groups must be A ({w.groups}, rank) and B (rank, "
            f"{w.shape[1]}); found A {tuple(a.shape)} and B {tuple(b.shape)}"
        )
    if w.offset is not None:
        raise ValueError("the weight already holds a merged offset; adapt the weight as it was before the merge")
