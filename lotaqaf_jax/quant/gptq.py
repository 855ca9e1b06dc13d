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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.quant.grid import LARGEST_SCALE, Grid
from lotaqaf_jax.quant.hessian import HessianFactor, factor_hessian

__all__ = ["GPTQResult", "quantize_layer"]

_BLOCK = 128  # at most so many rows are rounded before the rows behind them are updated, as in the paper


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
      hessian: (in, in) float32, from :func:`.accumulate_hessian`, or its factor from
        :func:`.factor_hessian`.
      bits: 2, 3, 4 or 8.
      group_size: input rows in a group, -1 for all; the last group may be smaller.
      sym: grid over [-max|W|, max|W|] with zero point 2^(bits-1); else over [min W, max W] and 0.
      desc_act: act-order, see :func:`.factor_hessian`; g_idx is then not monotone.
      act_group_aware: without ``desc_act``, the act-order that keeps groups together; a factor needs ``together`` equal
        to ``group_size``.
      damp_percent: see :func:`.factor_hessian`; not used when a factor is given.
      grid_search: fit each grid by trying narrower ranges. Each is tried by rounding the group's rows with it as
        above, and the one with the least sum of e^2 is kept: those sums, of all groups, add up to
        trace(E^T (H + damp * I) E). For groups of more than 128 rows the least sum |W - W^|^2.4, without feedback.
      name: of the layer, for messages.

    Raises:
      ConfigError: bits, group_size or damp_percent is out of range.
      CheckpointError: the weight is not finite, or beyond the range of float16.
      DataError: see :func:`.factor_hessian`.
      ValueError: weight, Hessian and desc_act do not agree.
    """
    if bits not in (2, 3, 4, 8):
        raise ConfigError(f"{name}: bits is {bits}; expected 2, 3, 4 or 8.")
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"{name}: group_size is {group_size}; expected -1 (one group) or more than 0.")
    w = jnp.asarray(weight, jnp.float32)
    if not (largest := float(jnp.max(jnp.abs(w), initial=0.0))) <= LARGEST_SCALE:
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
    return _quantize(w, factor, size, Grid(bits, sym, grid_search))


@functools.partial(jax.jit, static_argnames=("size", "grid"))
def _quantize(weight: jax.Array, factor: HessianFactor, size: int, grid: Grid) -> GPTQResult:
    (rows, out), groups = weight.shape, -(-weight.shape[0] // size)
    # A group becomes per_group blocks of one length, filled up with zero rows (inert, 0 is on every grid), so
    # that it starts with a block and finds all earlier errors fed back.
    per_group = -(-size // _BLOCK)
    block = -(-size // per_group)
    span = per_group * block
    group, within = np.divmod(np.arange(groups * span), span)
    places = np.where(within < size, np.minimum(group * size + within, rows), rows)  # rows: no row here
    weight = jnp.where(factor.dead[:, None], 0, weight)
    w, upper, pivots = weight[factor.order], factor.upper, jnp.diagonal(factor.upper)
    if len(places) > rows:  # else nothing is filled up, and U need not be copied
        w = w.at[places].get(mode="fill", fill_value=0)
        upper = upper.at[places[:, None], places].get(mode="fill", fill_value=0)
        pivots = pivots.at[places].get(mode="fill", fill_value=1)

    def do_block(carry: tuple, step: tuple) -> tuple[tuple, tuple]:
        w, fitted, loss = carry
        b, u, pivot = step  # u: (block, places), these rows of U
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=b * block)
        inner = here(u, slice_size=block, axis=1)

        def rounded(scale: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The errors e and the integers of the block's rows, (block, out), on this grid."""

            def do_row(i: jax.Array, state: tuple) -> tuple:
                v, errors, integers = state
                q = grid.integers(v[i], scale, zero)
                error = (v[i] - scale * (q - zero)) / pivot[i]
                v = v - inner[i][:, None] * error  # rows before i stay: U is zero left of its diagonal
                return v, errors.at[i].set(error), integers.at[i].set(q.astype(jnp.uint8))

            start = (here(w, slice_size=block), jnp.zeros_like(w[:block]), jnp.zeros((block, out), jnp.uint8))
            return lax.fori_loop(0, block, do_row, start)[1:]

        def fit() -> tuple[jax.Array, jax.Array]:
            group = here(w, slice_size=span)
            if per_group > 1:
                return grid.fit(group, functools.partial(grid.rounding_error, group))
            return grid.fit(group, lambda *tried: jnp.sum(rounded(*tried)[0] ** 2, axis=0))

        scale, zero = lax.cond(b % per_group == 0, fit, lambda: fitted)
        errors, integers = rounded(scale, zero)
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
