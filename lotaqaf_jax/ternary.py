"""The arithmetic of LoTA-QAF: threshold, boundary rule, offset, adjusted weight and lossless merge.

Ternary adapters A (in, rank) and B (rank, out), values in {-1, 0, 1}, move the integers q of a quantised weight by at
most one step of their own grid, and the group's zero point by a fraction mu of a step (paper Eq. 3-5):

    D  = A @ B                                       integers in [-rank, rank]
    T  = sign(D) * 1[|D| > omega]                    0 < omega < rank
    T  = 0 where q + T would leave {0, ..., 2**bits - 1}
    R  = D - omega * T                               a blocked entry keeps its whole D in R
    mu = mean of R over the rows of a group          offset="paper"
    mu = that mean / omega                           offset="reference"
    mu = 0                                           offset="none"
    W' = scales * (q + T - zeros + mu)

omega is a number, or an array of one: it may differ from matrix to matrix, and change in training (:mod:`.thresholds`).

Source: LoTA-QAF, arXiv 2505.18724. "reference" is the division by omega of the authors' code, which the paper does not
have.

What is trained is what is shipped: mu is rounded to the type it will be stored in before it is used, and the weight is
built by the same expression (:func:`lotaqaf_jax.quant.weight.affine`) from adapters and from merged words. Sums over D
and T are sums of small integers, exact in float32 in any order; the steps that do round are written in :func:`_mu` so
that no compiler can round them differently in another program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant.weight import QuantizedWeight, affine

__all__ = [
    "Offset",
    "Surrogate",
    "adapter_gradients",
    "adjusted_weight",
    "check_settings",
    "init_adapter",
    "merge",
    "ternary_step",
    "window",
]

Offset = Literal["reference", "paper", "none"]
Surrogate = Literal["straight", "window"]
Omega = float | jax.Array

WINDOW_WIDTH, WINDOW_BELOW, WINDOW_ABOVE = 0.3, 0.05, 0.2
"""Of :func:`window`: the width as a share of omega, and the least weight below omega and above it."""


def check_settings(rank: int, omega: Omega, offset: str, surrogate: str = "straight") -> None:
    """Check the settings of an adapter.

    Args:
        rank: inner size of the adapters, at least 2.
        omega: threshold on |D|, 0 < omega < rank: at omega >= rank nothing could ever move. Looked at only where its
            value is known: not of an array while a function is traced.
        offset: "reference", "paper" or "none".
        surrogate: "straight" or "window".

    Raises:
        ConfigError: names the setting, its value and the range.
    """
    if rank < 2:
        raise ConfigError(f"rank: found {rank}, expected at least 2, since the threshold lies between 0 and rank.")
    if not isinstance(omega, jax.core.Tracer) and not np.all((np.asarray(omega) > 0) & (np.asarray(omega) < rank)):
        raise ConfigError(
            f"omega: found {omega}, expected 0 < omega < rank = {rank}. The published setting is 0.75 * rank = "
            f"{0.75 * rank:g}."
        )
    if offset not in get_args(Offset):
        raise ConfigError(f"offset: found {offset!r}, expected one of {get_args(Offset)}.")
    if surrogate not in get_args(Surrogate):
        raise ConfigError(f"surrogate: found {surrogate!r}, expected one of {get_args(Surrogate)}.")


def init_adapter(key: jax.Array, in_features: int, out_features: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """Fresh adapters: A ternarised from a Kaiming normal draw, B = 0, so that W' = W exactly.

        A = 1[N > delta] - 1[N < -delta],   delta = 0.75 * mean|N|

    The scale of the draw N cancels against delta, so a unit normal gives the same A as the Kaiming normal of fan-in
    ``in_features``.

    Args:
        key: JAX random key.
        in_features: rows of A.
        out_features: columns of B.
        rank: columns of A and rows of B.

    Returns:
        A (in, rank) and B (rank, out), int8.

    Source: the authors' initialisation.
    """
    draw = jax.random.normal(key, (in_features, rank))
    delta = 0.75 * jnp.mean(jnp.abs(draw))
    a = (draw > delta).astype(jnp.int8) - (draw < -delta).astype(jnp.int8)
    return a, jnp.zeros((rank, out_features), jnp.int8)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """D, exact integers in float32."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _step_of(w: QuantizedWeight, a: jax.Array, b: jax.Array, omega: Omega) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q (int32), D (float32, exact integers) and T (int32), each (in, out)."""
    q = w.integers()
    d = _product(a, b)
    t = jnp.where(jnp.abs(d) > omega, jnp.sign(d), 0.0).astype(jnp.int32)
    moved = q + t
    inside = (moved >= 0) & (moved <= 2**w.bits - 1)
    return q, d, jnp.where(inside, t, 0)


def ternary_step(w: QuantizedWeight, a: jax.Array, b: jax.Array, *, omega: Omega) -> jax.Array:
    """T, the step of every integer: (in, out) int32 in {-1, 0, 1} (paper Eq. 3, with the boundary rule).

    Args:
        w: the quantised weight (in, out).
        a: ternary (in, rank), float or int8.
        b: ternary (rank, out), float or int8.
        omega: threshold, 0 < omega < rank.
    """
    return _step_of(w, a, b, omega)[2]


def offset_scale(omega: Omega, offset: str) -> Omega:
    """c, by which the group mean of R is multiplied to give mu."""
    return {"reference": 1.0 / omega, "paper": 1.0, "none": 0.0}[offset]


def _mu(
    w: QuantizedWeight, d: jax.Array, t: jax.Array, omega: Omega, offset: str, offset_dtype: Any
) -> jax.Array | None:
    """mu (groups, out) in its storage type, or None for offset="none".

    Compilers are free to contract a product and a sum into one operation that rounds once, and to turn a division into
    a product with the reciprocal, and XLA does so in one program and not in another. So there is no division but the
    reciprocal itself, every product that meets a sum is exact, and the two values that are not stand behind
    ``reduce_precision``, which is part of the result and not a hint: float32 keeps 22 of its 23 bits.
    """
    if offset == "none":
        return None
    return offset_of_sums(w, w.group_sum(d), w.group_sum(t).astype(jnp.float32), omega, offset, offset_dtype)


def offset_of_sums(
    w: QuantizedWeight, sum_d: jax.Array, sum_t: jax.Array, omega: Omega, offset: str, offset_dtype: Any
) -> jax.Array:
    """mu (groups, out) from the sums of D and of T over the rows of each group, (groups, out) float32.

    See :func:`_mu` for why it is written as it is. ``offset`` is "reference" or "paper".
    """
    total = sum_d
    for part in short_parts(omega):  # sum(R) = sum(D) - omega * sum(T)
        total = total - part * sum_t
    mean = total * inverse_rows(w, omega, offset)
    kept = jnp.finfo(offset_dtype)
    mu = jax.lax.reduce_precision(mean, exponent_bits=kept.nexp, mantissa_bits=min(kept.nmant, 22))
    return jax.lax.optimization_barrier(mu.astype(offset_dtype))


def inverse_rows(w: QuantizedWeight, omega: Omega, offset: str) -> jax.Array:
    """What the sum of R over a group is multiplied by to give mu: 1/rows, over omega for "reference"; (groups, 1)."""
    rows = w.group_rows() * (omega if offset == "reference" else 1.0)
    return jax.lax.reduce_precision(1.0 / rows, exponent_bits=8, mantissa_bits=22)


def short_parts(value: Omega) -> list[jax.Array]:
    """``value`` in float32 as a sum of three numbers of eight bits.

    The product of one of them and an integer below 65536, the rows of any group, is exact in float32.
    """
    rest, parts = jnp.asarray(value, jnp.float32), []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        parts.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        rest = rest - parts[-1]
    return parts


def window(d: jax.Array, omega: Omega) -> jax.Array:
    """h(|D|), how much the entry of D next to the threshold counts in the gradient of surrogate="window".

        h = max(exp(-((|D| - omega) / (0.3 * omega))**2), 0.05 where |D| <= omega, 0.2 above)

    An integer moves, or moves back, when |D| passes omega. A change of an entry far from it changes nothing, and the
    straight-through gradient, which counts it in full, is an estimate of the wrong thing. What is left of it keeps
    entries that no window reaches from never being asked again.

    Args:
        d: D = A @ B, any shape.
        omega: threshold.

    Returns:
        float32 in [0.05, 1], of the shape of ``d``.

    Source: ours; docs/results.md measures it.
    """
    size = jnp.abs(d).astype(jnp.float32)
    distance = (size - omega) / (WINDOW_WIDTH * omega)
    return jnp.maximum(jnp.exp(-jnp.square(distance)), jnp.where(size > omega, WINDOW_ABOVE, WINDOW_BELOW))


def adapter_gradients(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    dweight: jax.Array,
    *,
    omega: Omega,
    offset: Offset = "reference",
    surrogate: Surrogate = "straight",
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the adapters from the gradient of the adjusted weight, straight through the threshold.

        dD = h * s * dW' + c * groupmean(s * dW'),   c = 1 (paper), 1/omega (reference), 0 (none)
        dA = dD @ B.T,   dB = A.T @ dD

    Threshold and boundary rule count as the identity, and T inside R as a constant. h is 1 for surrogate="straight",
    and :func:`window` of D for "window".

    Args:
        w: the quantised weight (in, out).
        a: (in, rank).
        b: (rank, out).
        dweight: dL/dW', (in, out) float. Where it has 16 bits, dD is rounded to them before the products, which
            accumulate in float32: t-SignSGD reads sign and rank, and nothing of this size is made in float32.
        omega: threshold.
        offset: offset rule.
        surrogate: "straight" or "window".

    Returns:
        dA (in, rank) and dB (rank, out), float32.

    Source: the authors' code for h = 1; the paper does not spell it out.
    """
    scaled = w.spread(w.scales).astype(jnp.float32) * dweight.astype(jnp.float32)
    dd = scaled
    if surrogate == "window":
        dd = dd * window(_product(a, b), omega)
    if offset != "none":
        dd = dd + w.spread(offset_scale(omega, offset) * w.group_sum(scaled) / w.group_rows())
    dd = dd.astype(dweight.dtype)
    a, b = a.astype(dd.dtype), b.astype(dd.dtype)
    wide = functools.partial(
        jax.lax.dot_general,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,  # For float32 the default may be TF32 on a GPU.
    )
    return wide(dd, b, (((1,), (1,)), ((), ()))), wide(a, dd, (((0,), (0,)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _adjusted(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    omega: jax.Array,
    offset: Offset,
    offset_dtype: Any,
    surrogate: Surrogate,
) -> jax.Array:
    q, d, t = _step_of(w, a, b, omega)
    mu = _mu(w, d, t, omega, offset, offset_dtype)
    steps = q + t - w.spread(w.zeros).astype(jnp.int32)
    return affine(steps, w.spread(w.scales), None if mu is None else w.spread(mu))


_Saved = tuple[QuantizedWeight, jax.Array, jax.Array, jax.Array]


def _adjusted_fwd(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    omega: jax.Array,
    offset: Offset,
    offset_dtype: Any,
    surrogate: Surrogate,
) -> tuple[jax.Array, _Saved]:
    return _adjusted(w, a, b, omega, offset, offset_dtype, surrogate), (w, a, b, omega)


def _adjusted_bwd(
    offset: Offset, offset_dtype: Any, surrogate: Surrogate, saved: _Saved, g: jax.Array
) -> tuple[None, jax.Array | None, jax.Array | None, None]:
    w, a, b, omega = saved
    da, db = adapter_gradients(w, a, b, g, omega=omega, offset=offset, surrogate=surrogate)
    return None, _like(da, a), _like(db, b), None


def _like(gradient: jax.Array, primal: jax.Array) -> jax.Array | None:
    """The gradient in the type of its primal; None (zero) for an integer primal, which has no tangent."""
    return gradient.astype(primal.dtype) if jnp.issubdtype(primal.dtype, jnp.floating) else None


_adjusted.defvjp(_adjusted_fwd, _adjusted_bwd)


def adjusted_weight(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    *,
    omega: Omega,
    offset: Offset = "reference",
    offset_dtype: Any = jnp.float32,
    surrogate: Surrogate = "straight",
) -> jax.Array:
    """W' = scales * (q + T - zeros + mu), the weight that the adapters make of ``w``.

    Differentiable in float ``a`` and ``b`` by the straight-through rule of :func:`adapter_gradients`; ``w`` is frozen.

    Args:
        w: the quantised weight (in, out), without an offset of its own.
        a: ternary (in, rank), float or int8.
        b: ternary (rank, out), float or int8.
        omega: threshold, 0 < omega < rank.
        offset: "reference" (mean of R over omega), "paper" (mean of R) or "none".
        offset_dtype: the type mu will be stored in; mu is rounded to it before it is used.
        surrogate: of the gradient, see :func:`adapter_gradients`.

    Returns:
        (in, out) float32.

    Raises:
        ConfigError: omega or offset out of range.
        ValueError: shapes that do not fit, or a weight that already has an offset.

    Source: paper Eq. 3-5.
    """
    _check_shapes(w, a, b)
    check_settings(a.shape[-1], omega, offset, surrogate)
    return _adjusted(w, a, b, jnp.asarray(omega, jnp.float32), offset, offset_dtype, surrogate)


def merge(
    w: QuantizedWeight,
    a: jax.Array,
    b: jax.Array,
    *,
    omega: Omega,
    offset: Offset = "reference",
    offset_dtype: Any = jnp.float32,
) -> QuantizedWeight:
    """Take the adapters into the weight: integers q + T, packed, and mu as ``.offset``. Nothing is rounded.

    ``merge(w, a, b, ...).dequantize()`` equals ``adjusted_weight(w, a, b, ...)`` bit for bit.

    Args and errors: as :func:`adjusted_weight`.

    Returns:
        A QuantizedWeight of the same size, with ``offset`` (groups, out) of ``offset_dtype``, or None for
        offset="none".

    Source: paper Eq. 3-5.
    """
    _check_shapes(w, a, b)
    check_settings(a.shape[-1], omega, offset)
    q, d, t = _step_of(w, a, b, omega)
    mu = _mu(w, d, t, omega, offset, offset_dtype)
    return dataclasses.replace(w.with_integers(q + t), offset=mu)


def _check_shapes(w: QuantizedWeight, a: jax.Array, b: jax.Array) -> None:
    rank = a.shape[-1]
    if a.shape != (w.shape[0], rank) or b.shape != (rank, w.shape[1]):
        raise ValueError(
            f"adapters of a weight {w.shape} must be A ({w.shape[0]}, rank) and B (rank, {w.shape[1]}); "
            f"found A {tuple(a.shape)} and B {tuple(b.shape)}"
        )
    if w.offset is not None:
        raise ValueError("the weight already holds a merged offset; adapt the weight as it was before the merge")
