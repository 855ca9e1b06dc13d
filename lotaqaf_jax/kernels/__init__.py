"""Operations on quantised weights. Each file states its equation in plain JAX; ``choose`` picks an implementation."""

from lotaqaf_jax.kernels.linear import (
    TernaryAdapter,
    keep_products,
    merge_adapter,
    quantized_linear,
    weight_matrix,
)

__all__ = [
    "TernaryAdapter",
    "keep_products",
    "merge_adapter",
    "quantized_linear",
    "weight_matrix",
]
