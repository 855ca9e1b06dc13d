"""The gradient of a weight as a product of float8 numbers."""

from lotaqaf_jax.kernels.float8.product import float8_weight_gradient

__all__ = ["float8_weight_gradient"]
