"""Compilation that is quick, for tests whose time it is and that state nothing about what the compiler does.

Not for tests that compare the bits of different programs: an optimised program may contract products and sums, this one
does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

__all__ = ["quick_compilation"]


@contextlib.contextmanager
def quick_compilation(quick: bool = True) -> Iterator[None]:
    """Programs compiled within are hardly optimised, or as users have them where not ``quick``. They are forgotten
    behind it, as those before are in it, so that tests only ever see programs that were compiled alike."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", quick)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()
