"""Fixtures for the tests of generation."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Most of these tests' time is compilation, and nothing in them depends on how well a program is optimised.

    What was compiled so is forgotten behind them: other tests compare bits, of programs compiled alike.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
