"""Real processes, really killed: a run killed anywhere and restarted is, bit for bit, one that was not killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import write_rows
from tests.training.kill import PHASES

ROOT = Path(__file__).parents[2]
KILLS = 50


def drive(tiny_gptq: Path, folder: Path, *arguments: int) -> dict[str, Any]:
    """The report of ``tests.training.kill``, which raises where a run left something else than it should."""
    shutil.copytree(tiny_gptq, folder / "model")
    write_rows(folder / "rows.jsonl", 24)
    (folder / "tmp").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder / "tmp"),
        "JAX_PLATFORMS": "cpu",
        # A restart that finds its programs takes two seconds.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "tests.training.kill", str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(done.stderr[-3000:])  # shown where a test fails
    return json.loads(done.stdout)


def test_killed_at_any_point_and_restarted_is_the_same_as_never_killed(tiny_gptq: Path, tmp_path: Path) -> None:
    """One command line, started again after every kill: adapters, merged model and log are those of a whole run.

    So is the list of what lies in the output; between kills the newest checkpoint never gets lost, and the log is a
    beginning of the whole one. Delays are random around what is seen to happen, and from the seed.
    """
    report = drive(tiny_gptq, tmp_path, KILLS, 0)
    print(report)
    assert report["kills"] >= KILLS
    assert sum(report["phases"].values()) == report["kills"]
    for phase in PHASES:
        assert report["phases"][phase] >= 3, report


def test_a_full_disk_stops_the_run_with_a_sentence_and_it_goes_on_to_the_same_end(
    tiny_gptq: Path, tmp_path: Path
) -> None:
    """Once by a limit of the kernel's on what a process may write, once on a small file system of its own."""
    report = drive(tiny_gptq, tmp_path)
    assert report["limited"] == "done"
    if report["small"] == "refused":
        pytest.skip("this system does not let users mount a file system; the limit on files was tried")
    assert report["small"] == "done"
