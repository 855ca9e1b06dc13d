"""A decoder's steps through the kernels of decoding, against the uncached forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lotaqaf_jax.kernels import choose
from lotaqaf_jax.models import Decoder, DecoderConfig, QuantSpec
from tests.models.tiny import CONFIG, quantized_decoder, tokens

pytest.importorskip("triton")
pytest.importorskip("torch")

QWEN2 = dataclasses.replace(CONFIG, head_dim=16, num_hidden_layers=2)
LLAMA = dataclasses.replace(QWEN2, model_type="llama", qkv_bias=False, num_key_value_heads=1)


def in_type(model: Decoder, dtype: Any) -> Decoder:
    """The same weights, computed with in another type."""
    model = nnx.merge(*nnx.split(model), copy=True)
    model.dtype = jnp.dtype(dtype)
    return model


@pytest.mark.parametrize("config", [QWEN2, LLAMA], ids=lambda config: config.model_type)
def test_steps_through_the_kernels_are_those_of_the_uncached_forward_pass(
    config: DecoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized_decoder(config, QuantSpec(4, 16))
    ids = tokens(2, 2)
    expected = model.hidden_states(ids)
    monkeypatch.setattr(choose, "_default", lambda backend: "triton")
    half = in_type(model, jnp.float16)
    caches = half.empty_cache(2, 3)

    @jax.jit
    def step(token: jax.Array, position: jax.Array, caches: Any) -> Any:
        valid = jnp.broadcast_to(jnp.arange(3) <= position, (2, 3))
        return half.cached_hidden_states(token, jnp.full((2, 1), position), caches, position, valid)

    for i in range(2):
        hidden, caches = step(ids[:, i : i + 1], jnp.int32(i), caches)
        np.testing.assert_allclose(hidden[:, 0], expected[:, i], atol=0.03 * float(jnp.abs(expected).max()))
        for cache in caches:
            assert cache.keys[:, :, :, i].any()
            assert not cache.keys[:, :, :, i + 1 :].any()
