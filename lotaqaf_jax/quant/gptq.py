"""GPTQ for one linear layer (Frantar et al. 2022, arXiv 2210.17323), as pure functions.

The calibration inputs x (rows, in) of a layer y = x @ W enter only through the Hessian of its squared output
error, H = 2/rows * x^T x. With W^ the quantised weight and E = W - W^, GPTQ looks for a low trace(E^T H E) by
rounding the input rows one after the other and moving the error of each onto the rows still to come.

A driver that goes through a model block by block needs one Hessian (in, in) per distinct input of a block:

    hessian, count = accumulate_hessian(hessian, count, x)         # every calibration batch
    factor = factor_hessian(hessian, desc_act=False)               # once for q, k and v, which share x
    result = quantize_layer(weight, factor, bits=4, group_size=64, sym=False, desc_act=False)
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jax.typing import ArrayLike

from lotaqaf_jax.errors import CheckpointError, ConfigError, DataError

__all__ = ["GPTQResult", "HessianFactor", "accumulate_hessian", "factor_hessian", "quantize_layer"]

_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0  # of float16; a group of zeros needs a positive one too
_BLOCK = 128  # at most so many rows are rounded before the rows behind them are updated, as in the paper
_SHARES = 0.2 + 0.02 * np.arange(41)  # the ranges tried by the grid search, as shares of the full one
_SEARCH_NORM = 2.4  # of the rounding error in the grid search, as in the authors' code


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GPTQResult:
    """A quantised layer, W^[i, j] = scales[g_idx[i], j] * (integers[i, j] - zeros[g_idx[i], j]).

    Attributes:
      integers: (in, out) uint8 in {0..2^bits - 1}, in the row order of the weight.
      scales: (groups, out) float16, positive.
      zeros: (groups, out) uint8 in {0..2^bits - 1}, true zero points: not minus one, as v1 files store them.
      g_idx: (in,) int32, the group of every input row.
      loss: () float32, trace(E^T H E) with H as it was given, without damping.
    """

    integers: jax.Array
    scales: jax.Array
    zeros: jax.Array
    g_idx: jax.Array
    loss: jax.Array

    def dequantize(self) -> jax.Array:
        """Return W^ (in, out) float32."""
        steps = self.integers.astype(jnp.float32) - self.zeros.astype(jnp.float32)[self.g_idx]
        return self.scales.astype(jnp.float32)[self.g_idx] * steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HessianFactor:
    """What the rounding needs of a Hessian; layers with the same input share it.

    Attributes:
      upper: (in, in) float32, upper triangular U with (H[order][:, order] + damp * I)^-1 = U^T U.
      order: (in,) int32, the input rows in the order in which they are rounded.
      dead: (in,) bool, the input rows that were zero in all of the calibration data.
      damp: () float32, what was added to the diagonal.
      desc_act: static, whether order is act-order.
      together: static, rows of the groups that act-order keeps together, or None where it keeps none.
    """

    upper: jax.Array
    order: jax.Array
    dead: jax.Array
    damp: jax.Array
    desc_act: bool = dataclasses.field(metadata={"static": True})
    together: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.jit
def accumulate_hessian(
    hessian: jax.Array, count: ArrayLike, x: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Add the inputs of one batch to the running mean H = 2/count * x^T x over all rows seen.

    Args:
      hessian: (in, in) float32, zeros at the start.
      count: () integer, the rows seen so far, 0 at the start.
      x: (..., in) any float type, the inputs of the layer.
      mask: (...), nonzero where a row counts (padding does not), or None for all rows.

    Returns:
      The new (hessian, count). Wrap in ``jax.jit(..., donate_argnums=0)`` to update a large Hessian in place.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    keep = jnp.ones(len(rows), bool) if mask is None else mask.reshape(-1) != 0
    total = jnp.asarray(count, jnp.int32) + keep.sum(dtype=jnp.int32)
    share = 1 / jnp.maximum(total, 1).astype(jnp.float32)
    # A where, not a product: what padding computes may be NaN.
    scaled = jnp.where(keep[:, None], rows * jnp.sqrt(2 * share), 0)
    added = jnp.matmul(scaled.T, scaled, precision=lax.Precision.HIGHEST)
    return hessian * (jnp.asarray(count, jnp.float32) * share) + added, total


def factor_hessian(
    hessian: ArrayLike,
    *,
    desc_act: bool,
    together: int | None = None,
    damp_percent: float = 0.05,
    name: str = "layer",
) -> HessianFactor:
    """Order the rows and factorise the inverse of the damped Hessian (paper, section 3.3, step 3).

    With P the row order and damp = damp_percent * mean of the nonzero diag(H), U is upper triangular with
    (P H P^T + damp * I)^-1 = U^T U. A Hessian that cannot be factorised is damped more, with a warning.
    On the host, in float64: H is often nearly singular, and float32 would turn its small pivots to noise.
    With rows and columns reversed, one Cholesky and one triangular inverse give U; H^-1 is never formed.

    Args:
      hessian: (in, in) float32, from :func:`accumulate_hessian`; its scale does not matter.
      desc_act: act-order, rows by descending diag(H); else as they stand.
      together: without ``desc_act``, act-order that keeps groups of so many rows whole (-1: all rows): groups by the
        largest of diag(H) in them, rows in a group by diag(H), a partial last group last ("group-aware reordering",
        Gafni et al. 2025, arXiv 2505.14638). g_idx stays i // group_size.
      damp_percent: damping as a share of the mean diagonal, not negative (0.05 is five percent).
      name: of the layer, for messages.

    Raises:
      ConfigError: damp_percent is out of range.
      DataError: the Hessian is not finite, zero (no input reached the layer) or not positive semidefinite.
      ValueError: the Hessian is not square.
    """
    if not 0 <= damp_percent < np.inf:
        raise ConfigError(f"{name}: damp_percent is {damp_percent}; give a share of the mean, such as 0.05.")
    matrix = np.asarray(hessian)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name}: the Hessian has shape {matrix.shape}, expected (in, in)")
    if not np.isfinite(matrix).all():
        raise DataError(f"{name}: the Hessian is not finite; look for NaN in the calibration activations.")
    diagonal = np.diagonal(matrix).astype(np.float64)
    dead = diagonal == 0
    if dead.all():
        raise DataError(f"{name}: the Hessian is zero; no calibration input got here. Give more data.")
    order = _order(diagonal, desc_act, together)
    mean = float(diagonal[~dead].mean())
    # A dead row is coupled to no other, so that its pivot only has to be positive.
    pivots = np.where(dead, mean, diagonal)[order[::-1]]
    for percent in (damp_percent, *(p for p in 0.01 * 2.0 ** np.arange(14) if p > damp_percent)):
        damped = np.array(matrix[np.ix_(order[::-1], order[::-1])], dtype=np.float64, order="F")
        np.fill_diagonal(damped, pivots + percent * mean)
        lower, failed = scipy.linalg.lapack.dpotrf(damped, lower=1, overwrite_a=1)
        if not failed:
            break
    else:
        raise DataError(f"{name}: the Hessian is not positive semidefinite; it has to be a sum of x^T x.")
    if percent != damp_percent:
        warnings.warn(f"{name}: damp_percent {damp_percent} was not enough; took {percent}.", stacklevel=2)
    inverse, _ = scipy.linalg.lapack.dtrtri(lower, lower=1, overwrite_c=1)
    upper, damp = jnp.asarray(inverse[::-1, ::-1].astype(np.float32)), jnp.float32(percent * mean)
    return HessianFactor(upper, jnp.asarray(order, jnp.int32), jnp.asarray(dead), damp, desc_act, together)


def _order(diagonal: np.ndarray, desc_act: bool, together: int | None) -> np.ndarray:
    """The rows in the order of rounding."""
    rows = np.arange(len(diagonal))
    if desc_act:
        return np.argsort(-diagonal, kind="stable")
    if together is None:
        return rows
    group = rows // (len(rows) if together == -1 else together)
    largest = np.full(group[-1] + 1, -np.inf)
    np.maximum.at(largest, group, diagonal)
    if together != -1 and len(rows) % together:
        largest[-1] = -np.inf
    place = np.argsort(np.argsort(-largest, kind="stable"))  # of every group
    return np.lexsort((-diagonal, place[group]))


def quantize_layer(
    weight: ArrayLike,
    hessian: ArrayLike | HessianFactor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    act_group_aware: bool = False,
    damp_percent: float = 0.05,
    grid_search: bool = False,
    name: str = "layer",
) -> GPTQResult:
    """Quantise one layer (paper, Algorithm 1).

    Row i, in rounding order, goes to the nearest point of its group's grid; with e = (W[i] - W^[i]) / U[i, i]
    every later row moves by W[k] -= U[i, k] * e. A group's grid is fitted when its first row comes, to the
    weight as moved so far; its scale is rounded to float16 first, so that the feedback sees the stored one.
    Groups follow the rounding order: g_idx[order[i]] = i // group_size. An identity Hessian gives
    round-to-nearest. Dead rows (diag(H) = 0) become 0, as in the authors' code. All of it in float32.

    Args:
      weight: (in, out) any float type. Outputs are independent: a large layer can be given in slices of them.
      hessian: (in, in) float32, from :func:`accumulate_hessian`, or its factor from :func:`factor_hessian`.
      bits: 2, 3, 4 or 8.
      group_size: input rows in a group, -1 for all; the last group may be smaller.
      sym: grid over [-max|W|, max|W|] with zero point 2^(bits-1); else over [min W, max W] and 0.
      desc_act: act-order, see :func:`factor_hessian`; g_idx is then not monotone.
      damp_percent: see :func:`factor_hessian`; not used when a factor is given.
      grid_search: fit each grid by trying narrower ranges and keeping the least sum |W - W^|^2.4.
      name: of the layer, for messages.

    Raises:
      ConfigError: bits, group_size or damp_percent is out of range.
      CheckpointError: the weight is not finite, or beyond the range of float16.
      DataError: see :func:`factor_hessian`.
      ValueError: weight, Hessian and desc_act do not agree.
    """
    if bits not in (2, 3, 4, 8):
        raise ConfigError(f"{name}: bits is {bits}; expected 2, 3, 4 or 8.")
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"{name}: group_size is {group_size}; expected -1 (one group) or more than 0.")
    w = jnp.asarray(weight, jnp.float32)
    if not (largest := float(jnp.max(jnp.abs(w), initial=0.0))) <= _LARGEST_SCALE:
        raise CheckpointError(f"{name}: the largest weight is {largest}; expected it within float16.")
    factor = hessian
    together = group_size if act_group_aware and not desc_act else None
    if not isinstance(factor, HessianFactor):
        factor = factor_hessian(factor, desc_act=desc_act, together=together, damp_percent=damp_percent, name=name)
    wanted = (desc_act, together)
    if w.ndim != 2 or factor.upper.shape != (len(w), len(w)) or (factor.desc_act, factor.together) != wanted:
        found = f"Hessian {factor.upper.shape}, desc_act={factor.desc_act}, together={factor.together}"
        raise ValueError(f"{name}: weight {w.shape}, desc_act={desc_act}, together={together} do not fit {found}")
    size = len(w) if group_size == -1 else min(group_size, len(w))
    return _quantize(w, factor, size, _Grid(bits, sym, grid_search))


class _Grid(NamedTuple):
    """What a group's grid depends on, besides its weights."""

    bits: int
    sym: bool
    search: bool

    def integers(self, w: jax.Array, scale: jax.Array, zero: ArrayLike) -> jax.Array:
        return jnp.clip(jnp.round(w / scale) + zero, 0, 2**self.bits - 1)

    def fit(self, w: jax.Array) -> tuple[jax.Array, ...]:
        """Scale and zero point, both (out,) float32, for the rows w (size, out) of one group."""
        top = 2**self.bits - 1
        low, high = jnp.minimum(w.min(axis=0), 0), jnp.maximum(w.max(axis=0), 0)
        if self.sym:
            low, high = jnp.minimum(low, -high), jnp.maximum(high, -low)
        # The plain symmetric grid has both extremes half a step off; the first two put one on a point.
        tried = [top / (top + 1), top / (top - 1), *_SHARES] if self.sym else _SHARES

        def better(old: tuple, share: jax.Array) -> tuple[tuple, None]:
            scale = _to_float16((high - low) * share / top)
            zero = (0 * low + (top + 1) // 2) if self.sym else self.integers(-low * share, scale, 0)
            error = jnp.abs(scale * (self.integers(w, scale, zero) - zero) - w) ** _SEARCH_NORM
            new = (error.sum(axis=0), scale, zero)
            return jax.tree.map(functools.partial(jnp.where, new[0] <= old[0]), new, old), None

        shares = jnp.asarray(tried if self.search else [1.0], jnp.float32)
        return lax.scan(better, (jnp.full_like(low, jnp.inf), low, low), shares)[0][1:]


def _to_float16(scale: jax.Array) -> jax.Array:
    """The nearest positive float16, as float32. By arithmetic: XLA may drop a conversion there and back."""
    scale = jnp.clip(scale, _SMALLEST_SCALE, _LARGEST_SCALE)
    _, exponent = jnp.frexp(scale)  # scale = m * 2^exponent with m in [0.5, 1); float16 keeps 11 bits of m
    step = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 11, -24))
    return jnp.round(scale / step) * step


@functools.partial(jax.jit, static_argnames=("size", "grid"))
def _quantize(weight: jax.Array, factor: HessianFactor, size: int, grid: _Grid) -> GPTQResult:
    (rows, out), groups = weight.shape, -(-weight.shape[0] // size)
    # A group becomes per_group blocks of one length, filled up with zero rows (inert, 0 is on every grid), so
    # that it starts with a block and finds all earlier errors fed back.
    per_group = -(-size // _BLOCK)
    block = -(-size // per_group)
    span = per_group * block
    group, within = np.divmod(np.arange(groups * span), span)
    places = np.where(within < size, np.minimum(group * size + within, rows), rows)  # rows: no row here
    weight = jnp.where(factor.dead[:, None], 0, weight)
    w = weight[factor.order].at[places].get(mode="fill", fill_value=0)
    upper = factor.upper.at[places[:, None], places].get(mode="fill", fill_value=0)
    pivots = jnp.diagonal(factor.upper).at[places].get(mode="fill", fill_value=1)

    def do_block(carry: tuple, step: tuple) -> tuple[tuple, tuple]:
        w, fitted, loss = carry
        b, u, pivot = step  # u: (block, places), these rows of U
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=b * block)
        group = functools.partial(here, w, slice_size=span)
        scale, zero = lax.cond(b % per_group == 0, lambda: grid.fit(group()), lambda: fitted)
        inner = here(u, slice_size=block, axis=1)

        def do_row(i: jax.Array, state: tuple) -> tuple:
            v, errors, integers = state
            q = grid.integers(v[i], scale, zero)
            error = (v[i] - scale * (q - zero)) / pivot[i]
            v = v - inner[i][:, None] * error  # rows before i stay: U is zero left of its diagonal
            return v, errors.at[i].set(error), integers.at[i].set(q.astype(jnp.uint8))

        start = (here(w, slice_size=block), jnp.zeros_like(w[:block]), jnp.zeros((block, out), jnp.uint8))
        _, errors, integers = lax.fori_loop(0, block, do_row, start)
        w = w - jnp.matmul(u.T, errors, precision=lax.Precision.HIGHEST)
        return (w, (scale, zero), loss + jnp.sum(errors**2)), (integers, scale, zero)

    steps = (jnp.arange(groups * per_group), upper.reshape(-1, block, len(places)), pivots.reshape(-1, block))
    start = (w, (w[0], w[0]), jnp.float32(0))
    (*_, damped), (integers, scales, zeros) = lax.scan(do_block, start, steps)
    position = jnp.argsort(factor.order)  # of each row among the rounded ones
    label = jnp.arange(groups) if factor.together is None else factor.order[::size] // size
    result = GPTQResult(
        integers=integers.reshape(-1, out)[np.flatnonzero(places < rows)][position],
        scales=scales[::per_group][jnp.argsort(label)].astype(jnp.float16),
        zeros=zeros[::per_group][jnp.argsort(label)].astype(jnp.uint8),
        g_idx=label[position // size].astype(jnp.int32),
        loss=damped,
    )
    # The squared errors sum to trace(E^T (H + damp * I) E).
    added = factor.damp * jnp.sum((weight - result.dequantize()) ** 2)
    return dataclasses.replace(result, loss=jnp.maximum(damped - added, 0))
