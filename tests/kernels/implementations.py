"""The implementations that every kernel test runs over."""

from __future__ import annotations

import importlib.util

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
