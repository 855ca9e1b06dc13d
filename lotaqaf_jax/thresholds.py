"""Thresholds by the share of entries that pass them: omega of every matrix, from D = A @ B as it is.

D is a sum of ``rank`` ternary products, so its entries grow like sqrt(rank), while a threshold that is a share of rank
grows like rank: at the published 0.75 * rank it lies beyond what D reaches, and no integer moves. What does carry over
from one matrix, rank and model to another is the share of entries that pass:

    omega = the least whole number >= 1 with  #(|D| > omega) <= share * #(D)

The boundary rule keeps some of those entries from moving, so slightly fewer integers than ``share`` move.

Source: ours; docs/results.md measures it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.errors import ConfigError

__all__ = ["check_share", "omega_of_share", "ramped_share"]

COLUMNS = 512
RAMP = 0.3


def check_share(share: float) -> None:
    """Check a share of integers that is to move.

    Raises:
        ConfigError: it is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"moved: found {share}, expected a share of the integers, 0 < moved < 1.")


def ramped_share(share: float, step: Any, total_steps: int) -> jax.Array:
    """The share at step t = 1, 2, ...: it rises from 0 to ``share`` over the first 30 % of the steps.

        share * min(1, t / (0.3 * total_steps))

    The first entries of D that grow are not yet those that matter.
    """
    return share * jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / (RAMP * total_steps))


@jax.jit
def omega_of_share(a: jax.Array, b: jax.Array, share: float | jax.Array) -> jax.Array:
    """The omega that ``share`` of the entries of D = A @ B pass, at most, for every matrix.

    D is looked at in at most 512 columns, evenly spread, so that nothing of the weight's size is made.

    Args:
        a: (..., in, rank), values in {-1, 0, 1}, any type; leading axes stack layers.
        b: (..., rank, out), likewise.
        share: in [0, 1], one for all.

    Returns:
        (...) float32, whole numbers in [1, rank - 1].
    """
    if a.ndim > 2:
        return jax.lax.map(lambda pair: omega_of_share(*pair, share), (a, b))
    rank, n_out = b.shape
    b = b[:, :: -(-n_out // COLUMNS)]
    d = jnp.abs(jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST))
    allowed = jnp.floor(jnp.float32(share) * d.size).astype(jnp.int32)
    # The largest v that more entries reach than may pass, from its top bit down: those above it are few enough.
    found = jnp.float32(0)
    for bit in reversed(range(rank.bit_length())):
        reached = jnp.sum(d >= found + 2**bit, dtype=jnp.int32)
        found = found + jnp.where(reached > allowed, 2.0**bit, 0.0)
    return jnp.clip(found, 1, rank - 1)
