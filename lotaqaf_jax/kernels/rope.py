"""Rotary position embedding, in the half-split convention of Hugging Face checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["apply_rope"]


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each pair (x_i, x_{i + head_dim/2}) by its angle.

    Args:
        x: (batch, length, heads, head_dim).
        cos: (batch, length, 1, head_dim/2) float32.
        sin: likewise.

    Returns:
        The shape and type of ``x``; computed in float32.

    Source: RoFormer (arXiv 2104.09864).
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
