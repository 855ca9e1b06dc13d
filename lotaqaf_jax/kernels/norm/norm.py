"""A residual sum and the norm that follows: the equation in plain JAX, and the choice between it and the GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels.choose import choose
from lotaqaf_jax.kernels.norm import gpu
from lotaqaf_jax.kernels.parts import added

__all__ = ["add_norm", "reference", "rms_norm"]


def add_norm(
    x: jax.Array,
    update: jax.Array,
    weight: jax.Array,
    eps: float,
    layer: jax.Array | int | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x + update, and its :func:`rms_norm`.

    On a card, for a layer of a stack and up to 128 rows of 16 bits, one kernel does both: with so few rows a launch
    costs more than the arithmetic. The sum equals plain JAX's bit for bit; the mean is summed in another order.

    Args:
        x: (..., size).
        update: (..., size) in the type of ``x``; or (parts, ..., size) float32, products that are not yet whole: their
            sum over the parts, from the first to the last, rounded to the type of ``x``.
        weight: (size,), or (layers, size) with ``layer``.
        eps: added to the mean square.
        layer: () int32, which layer of a stack, the last one if there are fewer; None where there is no stack.
        implementation: see :func:`lotaqaf_jax.kernels.choose.choose`.

    Returns:
        The sum and its norm, both (..., size) in the type of ``x``.

    Raises:
        ConfigError: an unknown implementation, or shapes that do not fit each other.
    """
    parts = update.ndim == x.ndim + 1
    if update.shape[parts:] != x.shape or weight.shape[layer is not None :] != x.shape[-1:]:
        raise ConfigError(
            f"add_norm: x has shape {x.shape}, update {update.shape}, weight {weight.shape}, and layer is "
            f"{'None' if layer is None else 'given'}; expected x and update alike but for a leading axis of parts, and "
            "weight of their last axis, with an axis of layers where layer is given."
        )
    if choose(implementation) == "triton" and layer is not None and gpu.fits(x):
        return gpu.add_norm(x, update, weight, eps, layer)
    if layer is not None:
        weight = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    return reference(x, update, weight, eps)


def reference(x: jax.Array, update: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The equation, ``weight`` (size,)."""
    if update.ndim > x.ndim:
        update = added(update, x.dtype)
    x = x + update
    return x, rms_norm(x, weight, eps)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight * x / sqrt(mean(x**2) + eps), the mean in float32, the quotient rounded before it is multiplied.

    Args:
        x: (..., size).
        weight: (size,).
        eps: added to the mean square.

    Returns:
        (..., size) in the type of ``x``.

    Source: root mean square normalisation (arXiv 1910.07467), rounded as Llama's.
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * normed.astype(x.dtype)
