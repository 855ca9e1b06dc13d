"""The sum of a residual stream and its update, with the norm that follows."""

from lotaqaf_jax.kernels.norm.norm import add_norm, rms_norm

__all__ = ["add_norm", "rms_norm"]
