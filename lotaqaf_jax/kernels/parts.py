"""Products that programs have shared, in parts."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax

__all__ = ["added"]


def added(parts: jax.Array, dtype: Any) -> jax.Array:
    """The sum of (parts, ...) float32 over the parts, from the first to the last, rounded to ``dtype`` once: (...).

    Written out, it is one pass in this order; the order of a reduction would be XLA's to choose.
    """
    return functools.reduce(operator.add, [parts[i] for i in range(parts.shape[0])]).astype(dtype)
