"""The implementations that kernel tests run over."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest

_MISSING = [name for name in ("triton", "torch") if importlib.util.find_spec(name) is None]

TRITON = not _MISSING
"""Whether Triton's interpreter can run."""

IMPLEMENTATIONS = [
    "xla",
    pytest.param(
        "triton", marks=pytest.mark.skipif(bool(_MISSING), reason=f"Triton's interpreter needs {', '.join(_MISSING)}")
    ),
]


def cases(*, xla: Iterable[tuple[Any, ...]], triton: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters (implementation, ...) of a test: plain JAX, where every case is a program to compile, needs fewer
    cases than kernels that have layouts to tell apart."""
    kernel = IMPLEMENTATIONS[1]
    return [("xla", *case) for case in xla] + [pytest.param("triton", *case, marks=kernel.marks) for case in triton]
