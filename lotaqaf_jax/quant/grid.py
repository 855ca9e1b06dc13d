"""The grid of a group: which scale and zero point its weights are rounded by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

__all__ = ["LARGEST_SCALE", "Grid"]

_SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # of float16; a group of zeros needs a positive one too
_SHARES = 1 - 0.02 * np.arange(40)  # the ranges tried by the search, as shares of the full one
_TOGETHER = 8  # ranges that are tried at once
_NORM = 2.4  # of the rounding error where its feedback is not looked at, as in the authors' code


class Grid(NamedTuple):
    """What a group's grid depends on, besides its weights: the points are scale * ({0..2^bits - 1} - zero).

    Attributes:
      bits: width.
      sym: zero point 2^(bits-1), over [-max|W|, max|W|]; else one for each group, over [min W, max W] and 0.
      search: narrower ranges are tried too.
    """

    bits: int
    sym: bool
    search: bool

    def integers(self, w: jax.Array, scale: jax.Array, zero: ArrayLike) -> jax.Array:
        """The nearest points of the grid, as float32 in {0..2^bits - 1}."""
        return jnp.clip(jnp.round(w / scale) + zero, 0, 2**self.bits - 1)

    def fit(self, w: jax.Array, error: Callable[[jax.Array, jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Scale, a positive float16, and zero point, both (out,) float32, for the rows w (size, out) of one group.

        Args:
          w: the rows.
          error: of (scale, zero), both (out,), what is to be least, (out,). Called only where there is a choice.
        """
        scales, zeros = self._tried(w)
        if len(scales) == 1:
            return scales[0], zeros[0]
        errors = lax.map(lambda grid: error(*grid), (scales, zeros), batch_size=_TOGETHER)
        best = jnp.argmin(errors, axis=0)[None]  # of equals the first, the widest range
        return jnp.take_along_axis(scales, best, axis=0)[0], jnp.take_along_axis(zeros, best, axis=0)[0]

    def rounding_error(self, w: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        """sum |W - W^|^2.4 over the rows, without feedback between them; (out,)."""
        error = jnp.abs(scale * (self.integers(w, scale, zero) - zero) - w)
        return jnp.sum(error**_NORM, axis=0)

    def _tried(self, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The scales and zero points to choose from, both (n, out)."""
        top = 2**self.bits - 1
        low, high = jnp.minimum(w.min(axis=0), 0), jnp.maximum(w.max(axis=0), 0)
        shares = _SHARES if self.search else _SHARES[:1]
        if self.sym:
            low, high = jnp.minimum(low, -high), jnp.maximum(high, -low)
            if self.search:
                # The plain symmetric grid has both extremes half a step off; these two put one on a point.
                shares = np.array([top / (top - 1), *shares[:1], top / (top + 1), *shares[1:-2]])
        share = jnp.asarray(shares, jnp.float32)[:, None]
        scales = _to_float16((high - low) * share / top)
        zeros = jnp.full_like(scales, (top + 1) // 2) if self.sym else self.integers(-low * share, scales, 0)
        return scales, zeros


def _to_float16(scale: jax.Array) -> jax.Array:
    """The nearest positive float16, as float32. By arithmetic: XLA may drop a conversion there and back."""
    scale = jnp.clip(scale, _SMALLEST_SCALE, LARGEST_SCALE)
    _, exponent = jnp.frexp(scale)  # scale = m * 2^exponent with m in [0.5, 1); float16 keeps 11 bits of m
    step = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 11, -24))
    return jnp.round(scale / step) * step
