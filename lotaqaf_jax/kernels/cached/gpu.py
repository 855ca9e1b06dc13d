"""Attention over a cache on a GPU: the kernel's arguments, and the sum of its parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.launch import interpreted, launch
from lotaqaf_jax.kernels.sizes import padded

__all__ = ["attention", "fits"]

_SLOTS = 64  # of a round
# At least, before slots are shared between programs. Putting parts together is more kernels, which take about 5 us; a
# round takes about 1 us at most, so that two parts of four rounds may well be slower than one of eight. Not timed yet.
_ROUNDS = 4
_PROGRAMS = 264  # that keep an H200 busy
_MOST_HEADS = 64


def fits(q: jax.Array, keys: jax.Array) -> bool:
    """Whether it is one new token a row, of 16 bits, with a head size of 16, 32, 64, 128 or 256."""
    head_dim, shared = q.shape[-1], q.shape[2] // keys.shape[2]
    sizes = 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0 and shared <= _MOST_HEADS
    return q.shape[1] == 1 and sizes and q.dtype == keys.dtype and q.dtype in (jnp.bfloat16, jnp.float16)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    keys: jax.Array,
    values: jax.Array,
    valid: jax.Array,
    layer: jax.Array | int,
    slot: jax.Array | int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`.attention.cached_attention` for what fits.

    Where (row, key head) pairs are few and slots many, several programs share a pair; each gives its largest score m,
    the sum l of exp(score - m), and the values weighted by these, and the parts are put together as

        sum_i exp(m_i - m) part_i / sum_i exp(m_i - m) l_i,   m = max_i m_i
    """
    from lotaqaf_jax.kernels.cached.triton import attention_kernel

    batch, _, heads, head_dim = q.shape
    _, _, kv_heads, slots, _ = keys.shape
    shared = heads // kv_heads
    pairs = batch * kv_heads
    split = max(1, min(-(-_PROGRAMS // pairs), slots // (_SLOTS * _ROUNDS)))
    whole = split == 1
    part, largest, total, keys, values = launch(
        attention_kernel,
        q,
        k.astype(keys.dtype),
        v.astype(values.dtype),
        *rope,
        keys,
        values,
        valid.astype(jnp.int8),
        *(jnp.asarray(index, jnp.int32).reshape(1) for index in (layer, slot)),
        float(head_dim**-0.5),
        out=[
            jax.ShapeDtypeStruct((split, pairs, shared, head_dim), q.dtype if whole else jnp.float32),
            *[jax.ShapeDtypeStruct((1,) if whole else (split, pairs, shared), jnp.float32)] * 2,
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ],
        grid=(pairs, split),
        num_warps=4,
        num_stages=2,
        aliases={5: 3, 6: 4},
        PAIRS=pairs,
        HEADS=kv_heads,
        SHARED=shared,
        SLOTS=slots,
        SIZE=head_dim,
        SPLIT=split,
        ROUNDS=-(-slots // (_SLOTS * split)),
        ROWS=padded(shared),
        BLOCK=_SLOTS,
        INTERPRET=interpreted(),
    )
    if not whole:
        share = jnp.exp(largest - largest.max(axis=0))
        part = (part * share[..., None]).sum(axis=0) / (total * share).sum(axis=0)[..., None]
    return part.reshape(q.shape).astype(q.dtype), keys, values
