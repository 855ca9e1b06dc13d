"""Causal attention: cuDNN's flash kernel where it runs, plain JAX elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.choose import AMPERE, compute_capability

__all__ = ["causal_attention"]


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim) + mask) v, a query attending to keys at and before its own place.

    Args:
        q: (batch, length, heads, head_dim).
        k: (batch, length, kv_heads, head_dim); every kv head serves heads / kv_heads queries.
        v: as k.
        mask: (batch, 1, length, length) bool, False where a query may not look, or None for causality alone.

    Returns:
        (batch, length, heads, head_dim) in the type of ``q``.
    """
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, implementation="cudnn" if _fits_cudnn(q) else None
    )


def _fits_cudnn(q: jax.Array) -> bool:
    """cuDNN's flash attention takes 16-bit types and head sizes up to 128 in steps of 8, from Ampere on."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    return (compute_capability() or (0, 0)) >= AMPERE
