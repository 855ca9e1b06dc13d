"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of checkpoints and data that are too large, or not ours, to keep in the repository."""
    folder = Path(os.environ.get("LOTAQAF_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"the shared folder is absent: {folder} (set LOTAQAF_SHARED)")
    return folder
