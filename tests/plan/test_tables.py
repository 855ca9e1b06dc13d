"""docs/scaling.md holds what the calculator says."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "scaling_tables.py"
TEXT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_document_is_in_step_with_the_calculator(script: dict[str, Any]) -> None:
    """If not: python scripts/scaling_tables.py --write docs/scaling.md, and look at the text above the tables."""
    assert script["checked"]() in TEXT
    assert script["table"]("llama-3.3-70b") in TEXT
    assert all(f"### {title}" in TEXT for title in script["MODELS"].values())


def test_every_count_has_its_line(script: dict[str, Any]) -> None:
    found = "".join(script["rows"]("llama-3.1-405b", "h100")).splitlines()
    assert found[0].startswith("| 1, 2, 4 x H100 80 GB | does not fit: ")
    assert [line.split()[1] for line in found[1:]] == ["8", "16", "32", "64"]
    assert all(line.count("|") == 9 for line in found)


def test_a_file_without_marks_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("text")
    command = [sys.executable, str(SCRIPT), "--write", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "are missing; put them where the tables belong" in done.stderr
    assert file.read_text() == "text"
