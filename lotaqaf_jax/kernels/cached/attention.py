"""Attention of new tokens over a cache that takes them in: the equation in plain JAX, and the choice of the GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.cached import gpu
from lotaqaf_jax.kernels.choose import choose
from lotaqaf_jax.kernels.rope import apply_rope

__all__ = ["cached_attention", "reference", "write"]


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    keys: jax.Array,
    values: jax.Array,
    valid: jax.Array,
    layer: jax.Array | int,
    slot: jax.Array | int,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """softmax(rope(q) keys^T / sqrt(head_dim)) values over one layer's valid slots up to the new ones, in float32.

    Before that rope(k), rounded to the type of ``keys``, and v go to the slots from ``slot`` on. Query head h attends
    to key/value head h // (heads / kv_heads), which is never repeated in memory. On a card, for one new token a row in
    16 bits, one kernel does it all: it writes to the caches where they are, if nothing else needs the old ones, and
    reads their valid slots alone.

    Args:
        q: (batch, length, heads, head_dim), before rotary embedding.
        k: (batch, length, kv_heads, head_dim), likewise.
        v: (batch, length, kv_heads, head_dim).
        rope: cosine and sine, (batch, length, 1, head_dim/2) float32.
        keys: (layers, batch, kv_heads, slots, head_dim).
        values: likewise.
        valid: (batch, slots) bool, True where the row's slot holds a token to attend to, the new ones among them;
            what is marked behind these does not count. Or int8, which the kernel reads as it is: a loop over layers
            converts once.
        layer: () int32, which layer.
        slot: () int32, at least 0 and at most slots - length.
        implementation: see :func:`lotaqaf_jax.kernels.choose.choose`.

    Returns:
        What the queries gather, (batch, length, heads, head_dim) in the type of ``q``; keys; values.

    Raises:
        ConfigError: an unknown implementation.

    Source: grouped-query attention (arXiv 2305.13245); rotary embedding (arXiv 2104.09864).
    """
    if choose(implementation) == "triton" and gpu.fits(q, keys):
        return gpu.attention(q, k, v, rope, keys, values, valid, layer, slot)
    keys, values = write(keys, apply_rope(k, *rope), layer, slot), write(values, v, layer, slot)
    of_layer = [jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in (keys, values)]
    valid = valid.astype(bool) & (jnp.arange(keys.shape[3]) < slot + q.shape[1])
    return reference(apply_rope(q, *rope), of_layer[0], of_layer[1], valid), keys, values


def write(held: jax.Array, new: jax.Array, layer: jax.Array | int, slot: jax.Array | int) -> jax.Array:
    """A stack of keys or values with those of new tokens in the slots from ``slot`` on, the same slots in every row.

    One slice for all rows: of the forms an update can take, the one that compilers carry out in place.

    Args:
        held: (layers, batch, kv_heads, slots, head_dim).
        new: (batch, length, kv_heads, head_dim), keys rotated.
        layer: () int32.
        slot: () int32.
    """
    new = jnp.swapaxes(new, 1, 2)[None].astype(held.dtype)
    return jax.lax.dynamic_update_slice(held, new, (layer, 0, 0, slot, 0))


def reference(q: jax.Array, keys: jax.Array, values: jax.Array, valid: jax.Array) -> jax.Array:
    """The attention alone, for keys and values of one layer, (batch, kv_heads, slots, head_dim), and q rotated."""
    batch, length, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    if jax.default_backend() == "cpu":
        # XLA has no batched 16-bit products with float32 sums there.
        keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    grouped = q.astype(keys.dtype).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("blkgd,bksd->bkgls", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(valid[:, None, None, None, :], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgls,bksd->blkgd", weights, values, preferred_element_type=jnp.float32)
    return mixed.reshape(q.shape).astype(q.dtype)
