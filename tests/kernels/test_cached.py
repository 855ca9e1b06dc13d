"""Attention of one new token over a cache: every implementation against float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.kernels.cached import cached_attention
from tests.kernels.implementations import IMPLEMENTATIONS


def numbers(seed: int, *shape: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


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


# (batch, heads, kv_heads, slots, head_dim): slots in one part, in several, with a rest, and one head of each kind.
SIZES = [(2, 6, 2, 5, 16), (1, 10, 2, 600, 32), (3, 4, 4, 130, 16), (1, 2, 1, 1024, 16)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_only_valid_slots_of_the_layer_count(implementation: str, dtype: Any, sizes: tuple[int, ...]) -> None:
    batch, heads, kv_heads, slots, head_dim = sizes
    q = numbers(0, batch, 1, heads, head_dim, dtype=dtype)
    keys, values = (numbers(seed, 3, batch, kv_heads, slots, head_dim, dtype=dtype) for seed in (1, 2))
    valid = np.random.default_rng(3).random((batch, slots)) < 0.5
    valid[:, slots // 2 :] &= np.arange(batch)[:, None] % 2 == 1  # every other row has nothing in its second half
    valid[:, min(3, slots - 1)] = True
    # What lies in the other slots is not looked at by the kernel; plain JAX multiplies it by 0.
    hidden = jnp.where(valid[None, :, None, :, None], 0, jnp.nan)
    attend = jax.jit(
        lambda q, k, v, valid, layer: cached_attention(q, k, v, valid, layer, implementation=implementation)
    )
    kernel = implementation == "triton" and dtype != jnp.float32
    masked = (values + hidden).astype(dtype) if kernel else values
    found = attend(q, keys, masked, jnp.asarray(valid), jnp.int32(1))
    assert found.dtype == dtype
    error = np.abs(np.asarray(found, np.float64) - truth(q, keys[1], values[1], valid)).max()
    assert error <= {2: 2e-2 if dtype == jnp.bfloat16 else 3e-3, 4: 1e-5}[q.dtype.itemsize]


def test_several_new_tokens_are_left_to_plain_jax() -> None:
    q = numbers(0, 2, 3, 4, 16, dtype=jnp.float32)
    keys, values = (numbers(seed, 1, 2, 2, 9, 16, dtype=jnp.float32) for seed in (1, 2))
    valid = np.ones((2, 9), bool)
    for marks in (jnp.asarray(valid), jnp.asarray(valid, jnp.int8)):
        found = cached_attention(q, keys, values, marks, 0)
        np.testing.assert_allclose(found, truth(q, keys[0], values[0], valid), atol=1e-5)
