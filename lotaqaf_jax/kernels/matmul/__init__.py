"""The packed matmul of decoding, y = x @ W with W read from its packed words."""

from lotaqaf_jax.kernels.matmul.matmul import packed_matmul, packed_matmul_many

__all__ = ["packed_matmul", "packed_matmul_many"]
