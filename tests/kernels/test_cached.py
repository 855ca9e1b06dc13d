"""Attention of new tokens over a cache that takes them in: every implementation against float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.kernels.cached import cached_attention
from tests.kernels.implementations import TRITON, cases


def numbers(seed: int, *shape: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rotated(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Pairs (i, i + head_dim/2) as complex numbers turned by their angles, rounded once."""
    wide, half = np.asarray(x, np.float64), x.shape[-1] // 2
    turned = (wide[..., :half] + 1j * wide[..., half:]) * np.exp(1j * angles.astype(np.float64))
    return jnp.asarray(np.concatenate([turned.real, turned.imag], axis=-1), x.dtype)


def truth(q: jax.Array, keys: jax.Array, values: jax.Array, valid: np.ndarray) -> np.ndarray:
    """In float64, a head at a time, over the valid slots alone; keys and values of one layer."""
    queries, k_all, v_all = (np.asarray(array, np.float64) for array in (q, keys, values))
    out = np.zeros(queries.shape)
    batch, length, heads, head_dim = queries.shape
    for row, token, head in np.ndindex(batch, length, heads):
        kv_head = head // (heads // k_all.shape[1])
        k, v = k_all[row, kv_head][valid[row]], v_all[row, kv_head][valid[row]]
        scores = k @ queries[row, token, head] / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        out[row, token, head] = weights / weights.sum() @ v
    return out


# (batch, heads, kv_heads, slots, head_dim), slot: slots in one part, in several, with a rest, one head of each kind.
SIZES = [
    ((2, 6, 2, 5, 16), 0),
    ((2, 6, 2, 70, 16), 64),
    ((1, 10, 2, 600, 32), 444),
    ((3, 4, 4, 130, 16), 129),
    ((1, 2, 1, 1024, 16), 511),
]


# Parts of slots are the kernel's, which leaves float32 to plain JAX.
@pytest.mark.parametrize(
    ("implementation", "dtype", "sizes", "slot"),
    cases(
        xla=[(dtype, *SIZES[i]) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32) for i in (1, 2)],
        triton=[(dtype, *one) for dtype in (jnp.bfloat16, jnp.float16) for one in SIZES] + [(jnp.float32, *SIZES[1])],
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_new_token_is_taken_in_and_the_valid_slots_of_the_layer_count(
    implementation: str, dtype: Any, sizes: tuple[int, ...], slot: int
) -> None:
    batch, heads, kv_heads, slots, head_dim = sizes
    q, k, v = (numbers(i, batch, 1, n, head_dim, dtype=dtype) for i, n in enumerate((heads, kv_heads, kv_heads)))
    keys, values = (numbers(seed, 3, batch, kv_heads, slots, head_dim, dtype=dtype) for seed in (3, 4))
    angles = 100 * np.random.default_rng(5).random((batch, 1, 1, head_dim // 2))
    valid = np.random.default_rng(6).random((batch, slots)) < 0.5
    valid[:, slots // 2 :] &= np.arange(batch)[:, None] % 2 == 1  # every other row has nothing in its second half
    # What lies in the other slots is not looked at by the kernel; plain JAX multiplies it by 0. Nor is what the new
    # token's slot held before, nor anything behind it, although marked.
    before = valid & (np.arange(slots) < slot)
    hidden = jnp.asarray(np.where(before[None, :, None, :, None], 0, np.nan), dtype)
    kernel = implementation == "triton" and dtype != jnp.float32
    valid[:, slot] = True
    given = values + hidden if kernel else values
    attend = jax.jit(functools.partial(cached_attention, implementation=implementation))
    rope = (jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))
    found, *caches = attend(q, k, v, rope, keys, given, jnp.asarray(valid), jnp.int32(1), jnp.int32(slot))
    assert found.dtype == dtype
    turned = rotated(k, angles)
    written = np.asarray(caches[0][1, :, :, slot], np.float64)
    np.testing.assert_allclose(
        written, np.asarray(turned, np.float64)[:, 0], rtol=float(jnp.finfo(dtype).eps), atol=1e-6
    )
    for cache, held, new in ((caches[0], keys, caches[0][1, :, :, slot]), (caches[1], given, v[:, 0])):
        assert cache.dtype == dtype
        expected = np.array(held)
        expected[1, :, :, slot] = new
        np.testing.assert_array_equal(*(np.asarray(array, np.float32) for array in (cache, expected)))
    of_layer = np.array(values[1])
    of_layer[:, :, slot] = v[:, 0]
    valid = before | (np.arange(slots) == slot)
    error = np.abs(np.asarray(found, np.float64) - truth(rotated(q, angles), caches[0][1], of_layer, valid)).max()
    assert error <= {2: 3e-2 if dtype == jnp.bfloat16 else 3e-3, 4: 1e-5}[q.dtype.itemsize]


@pytest.mark.skipif(not TRITON, reason="Triton's interpreter is not there")
def test_the_kernel_writes_what_plain_jax_writes() -> None:
    """Bit for bit: in float16, to which the interpreter rounds as a card does, and op by op, without contraction."""
    arguments = (
        *(numbers(i, 3, 1, n, 64, dtype=jnp.float16) for i, n in enumerate((8, 2, 2))),
        tuple(jnp.asarray(f(numbers(3, 3, 1, 1, 32, dtype=jnp.float32))) for f in (jnp.cos, jnp.sin)),
        *(numbers(i, 2, 3, 2, 600, 64, dtype=jnp.float16) for i in (4, 5)),
        jnp.ones((3, 600), jnp.int8),
        1,
        77,
    )
    (mixed, *caches), (expected, *written) = (cached_attention(*arguments, implementation=i) for i in ("triton", "xla"))
    for one, other in zip(caches, written, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(mixed, expected, atol=2e-3)


def test_several_new_tokens_are_left_to_plain_jax() -> None:
    q, k, v = (numbers(i, 2, 3, n, 16, dtype=jnp.float32) for i, n in enumerate((4, 2, 2)))
    keys, values = (numbers(seed, 1, 2, 2, 9, 16, dtype=jnp.float32) for seed in (3, 4))
    angles = np.random.default_rng(5).random((2, 3, 1, 8))
    rope = (jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))
    valid = np.arange(9) < np.full((2, 1), 7)
    turned = [jnp.swapaxes(x, 1, 2) for x in (rotated(k, angles), v)]
    held = [cache[0].at[:, :, 4:7].set(new) for cache, new in zip((keys, values), turned, strict=True)]
    for marks in (jnp.asarray(valid), jnp.ones((2, 9), jnp.int8)):
        found, *caches = cached_attention(q, k, v, rope, keys, values, marks, 0, 4)
        np.testing.assert_allclose(found, truth(rotated(q, angles), *held, valid), atol=1e-5)
        for cache, expected in zip(caches, held, strict=True):
            np.testing.assert_allclose(cache[0], expected, atol=1e-6)
