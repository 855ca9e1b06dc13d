"""Operations on quantised weights. Each file states its equation in plain JAX; ``choose`` picks an implementation."""

from lotaqaf_jax.kernels.adapter import AnyAdapter, GroupLowRank, LowRank, TernaryAdapter, WeightAdapter
from lotaqaf_jax.kernels.linear import keep_product, keep_products, quantized_linear, weight_matrix
from lotaqaf_jax.kernels.merge import merge_adapter, merge_and_count

__all__ = [
    "AnyAdapter",
    "GroupLowRank",
    "LowRank",
    "TernaryAdapter",
    "WeightAdapter",
    "keep_product",
    "keep_products",
    "merge_adapter",
    "merge_and_count",
    "quantized_linear",
    "weight_matrix",
]
