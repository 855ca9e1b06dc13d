"""Rotary position embedding against its definition in complex numbers and float64."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.kernels.rope import apply_rope
from lotaqaf_jax.models import DecoderConfig
from lotaqaf_jax.models.config import Llama3Rope
from lotaqaf_jax.models.rope import inverse_frequencies, rope_angles

CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "rope_theta": 500000.0,
    }
)
LLAMA3 = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
def test_frequencies_fall_with_powers_of_theta(theta: float) -> None:
    found = inverse_frequencies(dataclasses.replace(CONFIG, rope_theta=theta))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, theta ** (-np.arange(64) / 64.0), rtol=2e-6)


def test_llama3_scales_long_waves_keeps_short_ones_and_mixes_between() -> None:
    plain = inverse_frequencies(CONFIG).astype(np.float64)
    found = inverse_frequencies(dataclasses.replace(CONFIG, rope_scaling=LLAMA3))
    kinds = set()
    for f, scaled in zip(plain, found, strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            kind, expected = "kept", f
        elif wavelength > 8192 / 1:
            kind, expected = "divided", f / 8
        else:
            mix = (8192 / wavelength - 1) / (4 - 1)
            kind, expected = "mixed", (1 - mix) * f / 8 + mix * f
        kinds.add(kind)
        np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    assert kinds == {"kept", "divided", "mixed"}


def test_each_pair_is_turned_by_its_angle() -> None:
    """(x_i, x_{i+d/2}) as a complex number times exp(i * position * frequency)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 128)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 100, 0, 4095, 1]])
    cos, sin = rope_angles(jnp.asarray(positions), CONFIG)
    assert cos.shape == sin.shape == (2, 5, 1, 64)
    turned = apply_rope(jnp.asarray(x), cos, sin)

    pairs = x[..., :64].astype(np.complex128) + 1j * x[..., 64:]
    angle = positions[..., None, None] * inverse_frequencies(CONFIG).astype(np.float64)
    expected = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=2e-3)
    np.testing.assert_allclose(turned[0], np.concatenate([expected.real, expected.imag], -1)[0], atol=2e-6)
    np.testing.assert_array_equal(turned[0, 0], x[0, 0], err_msg="position 0 turns nothing")


def test_products_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 128)), jnp.float32) for _ in range(2))

    def product(i: int, j: int) -> jax.Array:
        turn = [apply_rope(v, *rope_angles(jnp.array([[p]]), CONFIG)) for v, p in ((q, i), (k, j))]
        return jnp.sum(turn[0] * turn[1])

    np.testing.assert_allclose(product(3, 10), product(103, 110), rtol=1e-4)
    assert abs(product(3, 10) - product(3, 11)) > 1e-2


def test_the_type_is_kept() -> None:
    x = jnp.ones((1, 2, 1, 128), jnp.bfloat16)
    assert apply_rope(x, *rope_angles(jnp.array([[0, 1]]), CONFIG)).dtype == jnp.bfloat16
