"""Attention over a cache of keys and values."""

from lotaqaf_jax.kernels.cached.attention import cached_attention

__all__ = ["cached_attention"]
