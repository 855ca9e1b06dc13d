"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.cached import cached_attention, write

__all__ = ["KVCache"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after rotary embedding) and values of a run of layers, in a fixed number of slots.

    ``keys`` and ``values`` are (layers, batch, kv_heads, slots, head_dim). The slots stand next to head_dim, so that
    both products of attention are plain batched ones over (batch, kv_heads) and nothing is transposed.
    Which slots of a row hold a token is for the caller to know: attention does not care in what order they stand, as
    long as none stands behind the newest.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, layers: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: Any) -> KVCache:
        """A cache of zeros."""
        shape = (layers, batch, kv_heads, slots, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, k: jax.Array, v: jax.Array, layer: jax.Array, slot: jax.Array | int) -> KVCache:
        """The cache with rotated ``k``, and ``v``, (batch, length, kv_heads, head_dim), in the slots from ``slot``."""
        return KVCache(write(self.keys, k, layer, slot), write(self.values, v, layer, slot))

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        valid: jax.Array,
        layer: jax.Array,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, KVCache]:
        """What queries gather from one layer, and the cache with k and v in it: :func:`cached_attention`."""
        mixed, *held = cached_attention(q, k, v, rope, self.keys, self.values, valid, layer, slot)
        return mixed, KVCache(*held)
