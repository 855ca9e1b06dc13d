"""Keys and values of the tokens seen so far, and attention over them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["KVCache", "cached_attention"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after rotary embedding) and values of a run of layers, in a fixed number of slots.

    ``keys`` and ``values`` are (layers, batch, kv_heads, slots, head_dim). The slots stand next to head_dim, so that
    both products of :func:`cached_attention` are plain batched ones over (batch, kv_heads) and nothing is transposed.
    Which slots of a row hold a token is for the caller to know: attention does not care in what order they stand.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, layers: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: Any) -> KVCache:
        """A cache of zeros."""
        shape = (layers, batch, kv_heads, slots, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, layer: jax.Array, slot: jax.Array | int, k: jax.Array, v: jax.Array) -> KVCache:
        """The cache with ``k`` and ``v`` of one layer in the slots from ``slot`` on, the same slots in every row.

        One slice for all rows: of the forms an update can take, the one that compilers carry out in place.

        Args:
            layer: () int32.
            slot: () int32.
            k: (batch, length, kv_heads, head_dim).
            v: likewise.
        """

        def put(held: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.swapaxes(new, 1, 2)[None].astype(held.dtype)
            return jax.lax.dynamic_update_slice(held, new, (layer, 0, 0, slot, 0))

        return KVCache(put(self.keys, k), put(self.values, v))

    def layer(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, (batch, kv_heads, slots, head_dim) each."""
        keys, values = (
            jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (self.keys, self.values)
        )
        return keys, values


def cached_attention(q: jax.Array, keys: jax.Array, values: jax.Array, valid: jax.Array) -> jax.Array:
    """softmax(q keys^T / sqrt(head_dim)) values over the valid slots, the softmax in float32.

    Query head h attends to key/value head h // (heads / kv_heads), which is never repeated in memory.

    Args:
        q: (batch, length, heads, head_dim).
        keys: (batch, kv_heads, slots, head_dim).
        values: likewise.
        valid: (batch, slots) bool, True where the row's slot holds a token to attend to; at least one in every row.

    Returns:
        (batch, length, heads, head_dim) in the type of ``q``.

    Source: grouped-query attention (arXiv 2305.13245).
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("blkgd,bksd->bkgls", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(valid[:, None, None, None, :], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgls,bksd->blkgd", weights, values, preferred_element_type=jnp.float32)
    return mixed.reshape(q.shape).astype(q.dtype)
