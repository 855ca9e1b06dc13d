"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and data beside the repository, or where LOTAQAF_SHARED says."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("LOTAQAF_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}; set LOTAQAF_SHARED to run the tests on real files")
    return folder
