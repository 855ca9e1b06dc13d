"""Without a card, Triton's interpreter runs the kernels; Triton reads the variable when a kernel is defined."""

import os
from collections.abc import Iterator

import jax
import pytest

from tests.quick import quick_compilation

if jax.default_backend() != "gpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Scripts are run for what they write and find, not for how fast a program is."""
    with quick_compilation():
        yield
