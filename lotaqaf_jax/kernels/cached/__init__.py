"""Attention over a cache of keys and values, which takes in those of new tokens."""

from lotaqaf_jax.kernels.cached.attention import cached_attention, write

__all__ = ["cached_attention", "write"]
