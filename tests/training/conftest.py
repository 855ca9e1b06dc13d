"""A tiny GPTQ model with a tokenizer, and a tiny dataset, for the tests of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lotaqaf_jax.models import Decoder, add_adapters, load_pretrained

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def write_rows(path: Path, count: int) -> Path:
    """A dataset of ``count`` rows: name a number's successor."""
    rows = [{"prompt": f"after {i} ", "completion": f"comes {i + 1}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ Llama of two layers, asymmetric with act-order, written by GPTQModel, with its tokenizer."""
    return write_tiny_gptq(tmp_path_factory.mktemp("gptq") / "tiny")


def write_tiny_gptq(folder: Path) -> Path:
    """The model of :func:`tiny_gptq`, in a folder that is not there yet."""
    shutil.copytree(CHECKPOINTS / "ckpt-llama-b4g32-asym-desc", folder)
    for file in (CHECKPOINTS / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def adapted(tiny_gptq: Path) -> Decoder:
    """The tiny model with fresh adapters, in two of its projections: a step compiles in half the time."""
    return add_adapters(load_pretrained(tiny_gptq, progress=False), 8, 2, target_modules=("q_proj", "up_proj"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """24 rows in a JSON-lines file."""
    return write_rows(tmp_path / "rows.jsonl", 24)
