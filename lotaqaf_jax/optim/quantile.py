"""The entry of a tensor that stands for its quantile: which one it is, and finding it without sorting.

numpy interpolates the quantile at the level 1 - tail between the two sorted entries around the position
(1 - tail) * (n - 1), which is tail * (n - 1) from the top. No entry lies strictly between these two
neighbours. So the entries above the quantile are those above its lower neighbour, and the entries at or above
the quantile are those at or above its upper neighbour. Comparing with a neighbour gives the exact answer,
which interpolation in floating point does not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["kth_largest", "lower_neighbour"]


def lower_neighbour(tail: Any, entries: int) -> Any:
    """Rank from the top of the largest entry at or below the quantile at 1 - tail: ceil(tail * (n - 1)).

    This is also how many entries lie above the quantile, where all are distinct.

    Counting from the top keeps the digits that (1 - tail) * (n - 1) loses: in float32 that is off by whole
    entries from n = 10^6 on. Where tail * (n - 1) is an integer, rounding must not lift it to the next: hence
    the margin.

    Args:
      tail: in [0, 1], any shape: a numpy array, or a JAX array. float64 gives the exact rank; float32 gives
        tail * (n - 1) to about one part in 10^5.
      entries: n, at least 1.

    Returns:
      int32 of the shape of tail, in [0, n - 1].
    """
    # 1e-13 is above the rounding error of our schedules in float64, and up to 2000 steps and n = 2^24 it is
    # below the distance of tail * (n - 1) from an integer that is not meant.
    xp, margin = (jnp, 1e-6) if isinstance(tail, jax.Array) else (np, 1e-13)
    return xp.clip(xp.ceil(tail * (entries - 1) * (1 - margin)), 0, entries - 1).astype(np.int32)


def kth_largest(magnitude: jax.Array, rank: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest value v that more than ``rank`` entries over ``axes`` reach: #(magnitude >= v) > rank.

    Non-negative floats are ordered as their bit patterns, so v is found from its top bits down, by counting. Over
    sharded axes only the counts travel. A GPU is limited by reading the tensor, so that a few bits are settled in one
    reading, by as many counts as they have values; a CPU is limited by counting, and takes them one by one.

    Args:
      magnitude: float32, any shape, not negative.
      rank: () integer, from 0 for the largest entry to the number of entries over ``axes`` less one.
      axes: the axes to look over; every index of the others has its own result.

    Returns:
      float32, the shape of ``magnitude`` with length 1 in ``axes``.
    """
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    width = 3 if jax.default_backend() == "gpu" else 1
    rounds, first = divmod(31, width)

    def add_digit(found: jax.Array, low: int | jax.Array, width: int) -> jax.Array:
        # Values of the digit that more than ``rank`` entries reach; the largest of them is the digit of v.
        digit = jnp.zeros_like(found)
        for value in range(1, 2**width):
            reached = jnp.sum(bits >= found + (value << low), axis=axes, keepdims=True, dtype=jnp.int32)
            digit += (reached > rank).astype(jnp.int32)
        return found + (digit << low)

    found = add_digit(jnp.zeros_like(jnp.max(bits, axis=axes, keepdims=True)), 31 - first, first)
    found = jax.lax.fori_loop(0, rounds, lambda i, found: add_digit(found, width * (rounds - 1 - i), width), found)
    return jax.lax.bitcast_convert_type(found, jnp.float32)
