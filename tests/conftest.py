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


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make interop` runs the tests that open our folders with GPTQModel, transformers and PEFT."""
    parser.addoption("--run-interop", action="store_true", help="run tests/interop; needs LOTAQAF_INTEROP_PYTHON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-interop"):
        return
    skip = pytest.mark.skip(reason="needs GPTQModel and PEFT: run `make interop`")
    for item in items:
        if "interop" in item.path.parts:
            item.add_marker(skip)
