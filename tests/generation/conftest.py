"""Fixtures for the tests of generation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.quick import quick_compilation


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Nothing here depends on how well a program is optimised."""
    with quick_compilation():
        yield
