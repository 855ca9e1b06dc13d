"""The arithmetic of LoRA: a low-rank product beside a frozen weight.

    y = x @ W + c * (x @ A) @ B,   A (in, rank), B (rank, out), c = alpha / rank

Source: LoRA, arXiv 2106.09685; the start of A, and parameters of float32 in a model that computes in 16 bit, as PEFT
has them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lotaqaf_jax.errors import ConfigError

__all__ = ["check_settings", "init_pair", "low_rank_product"]


def check_settings(rank: int, alpha: float) -> None:
    """Check the settings of a low-rank adapter.

    Args:
        rank: inner size of the adapters, at least 1.
        alpha: the product is multiplied by alpha / rank; finite and more than 0.

    Raises:
        ConfigError: names the setting, its value and the range.
    """
    if rank < 1:
        raise ConfigError(f"rank: found {rank}, expected at least 1.")
    if not 0 < alpha < math.inf:
        raise ConfigError(
            f"alpha: found {alpha}, expected a number above 0. The published setting is 2 * rank = {2 * rank}."
        )


def init_pair(key: jax.Array, in_features: int, out_features: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """Fresh adapters: A Kaiming uniform with a = sqrt(5), which is uniform in +-1/sqrt(in), and B = 0.

    Args:
        key: JAX random key.
        in_features: rows of A.
        out_features: columns of B.
        rank: columns of A and rows of B.

    Returns:
        A (in, rank) and B (rank, out), float32.

    Source: ``torch.nn.Linear(in, rank)``'s own start, which PEFT takes over.
    """
    bound = 1 / math.sqrt(in_features)
    a = jax.random.uniform(key, (in_features, rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((rank, out_features), jnp.float32)


def low_rank_product(x: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """scale * (x @ A) @ B, computed in the type of ``x``; differentiable in all three arrays.

    Args:
        x: (..., in).
        a: (in, rank) float, rounded to the type of ``x``.
        b: (rank, out) float, likewise.
        scale: c = alpha / rank.

    Returns:
        (..., out) in the type of ``x``.
    """
    return jnp.matmul(jnp.matmul(x, a.astype(x.dtype)), b.astype(x.dtype)) * jnp.asarray(scale, x.dtype)
