"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.cached import cached_attention

__all__ = ["KVCache"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after rotary embedding) and values of a run of layers, in a fixed number of slots.

    ``keys`` and ``values`` are (layers, batch, kv_heads, slots, head_dim). The slots stand next to head_dim, so that
    both products of attention are plain batched ones over (batch, kv_heads) and nothing is transposed.
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

    def attend(self, q: jax.Array, valid: jax.Array, layer: jax.Array) -> jax.Array:
        """What queries (batch, length, heads, head_dim) gather from one layer: :func:`cached_attention`."""
        return cached_attention(q, self.keys, self.values, valid, layer)
