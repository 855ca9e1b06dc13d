"""Angles of the rotary position embedding; :mod:`lotaqaf_jax.kernels.rope` rotates by them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lotaqaf_jax.models.config import DecoderConfig

__all__ = ["inverse_frequencies", "rope_angles"]


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """Rotation per position of each pair, (head_dim/2,) float32.

        f_i = theta ** (-2i / head_dim)

    and with ``rope_type: llama3``, where L is the original context and lambda = 2*pi/f the wavelength:

        f               for lambda < L / high_freq_factor
        f / factor      for lambda > L / low_freq_factor
        (1-m) f/factor + m f   between, m = (L/lambda - low) / (high - low)

    Source: RoFormer (arXiv 2104.09864); the scaling of Llama 3.1's published configuration.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies.astype(np.float64) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    mix = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - mix) * frequencies / scaling.factor + mix * frequencies).astype(np.float32)


def rope_angles(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position * frequency: (batch, length) -> two (batch, length, 1, head_dim/2) float32."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)
