"""Operations on quantised weights. Each file states its equation in plain JAX; ``choose`` picks an implementation."""

from lotaqaf_jax.kernels.linear import TernaryAdapter, merge_adapter, quantized_linear, weight_matrix

__all__ = ["TernaryAdapter", "merge_adapter", "quantized_linear", "weight_matrix"]
