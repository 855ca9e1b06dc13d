"""A base, its adapter model, and what is written from them; made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import convert
from convert.verify import Report
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model, checkpoint

BASE = "ckpt-llama-b4g32-asym-desc"


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """An asymmetric act-order base, with a tokenizer and with files that are no part of a model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    for name in (BASE, "tokenizer"):
        source = checkpoint(name)
        assert source is not None
        shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "README.md").write_text("the card of the base")
    (folder / ".cache").mkdir()
    return CheckpointFolder(folder)


@pytest.fixture(scope="package")
def model(base: CheckpointFolder) -> Decoder:
    return adapter_model(base)


@pytest.fixture(scope="package")
def adapter(base: CheckpointFolder, model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    convert.save_adapter(model, folder, base=base, progress=False)
    return folder


@pytest.fixture(scope="package")
def exported(base: CheckpointFolder, model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("exported") / "merged"
    return folder, convert.merge_and_save(model, folder, base=base, progress=False)


@pytest.fixture
def merged(exported: tuple[Path, Report], tmp_path: Path) -> Path:
    """A copy of the merged folder, to be damaged."""
    return Path(shutil.copytree(exported[0], tmp_path / "merged"))
