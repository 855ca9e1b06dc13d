"""Attention of new tokens over a cache: the equation in plain JAX, and the choice between it and the GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.cached import gpu
from lotaqaf_jax.kernels.choose import choose

__all__ = ["cached_attention", "reference"]


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    valid: jax.Array,
    layer: jax.Array | int,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q keys^T / sqrt(head_dim)) values over the valid slots of one layer, the softmax in float32.

    Query head h attends to key/value head h // (heads / kv_heads), which is never repeated in memory. On a card, for
    one new token a row in 16 bits, a kernel reads the valid slots alone, where the stack holds them.

    Args:
        q: (batch, length, heads, head_dim).
        keys: (layers, batch, kv_heads, slots, head_dim).
        values: likewise.
        valid: (batch, slots) bool, True where the row's slot holds a token to attend to; at least one in every row. Or
            int8, which the kernel reads as it is: a loop over layers converts once.
        layer: () int32, which layer.
        implementation: see :func:`lotaqaf_jax.kernels.choose.choose`.

    Returns:
        (batch, length, heads, head_dim) in the type of ``q``.

    Raises:
        ConfigError: an unknown implementation.

    Source: grouped-query attention (arXiv 2305.13245).
    """
    if choose(implementation) == "triton" and gpu.fits(q, keys):
        return gpu.attention(q, keys, values, valid, layer)
    keys, values = (jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in (keys, values))
    return reference(q, keys, values, valid)


def reference(q: jax.Array, keys: jax.Array, values: jax.Array, valid: jax.Array) -> jax.Array:
    """The equation, for keys and values of one layer, (batch, kv_heads, slots, head_dim)."""
    batch, length, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    if jax.default_backend() == "cpu":
        # XLA has no batched 16-bit products with float32 sums there.
        keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    grouped = q.astype(keys.dtype).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("blkgd,bksd->bkgls", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(valid.astype(bool)[:, None, None, None, :], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgls,bksd->blkgd", weights, values, preferred_element_type=jnp.float32)
    return mixed.reshape(q.shape).astype(q.dtype)
