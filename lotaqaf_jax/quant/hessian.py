"""The Hessian of a layer's squared output error, H = 2/rows * x^T x, and the factor of its inverse that GPTQ needs."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jax.typing import ArrayLike

from lotaqaf_jax.errors import ConfigError, DataError

__all__ = ["HessianFactor", "accumulate_hessian", "factor_hessian"]


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
