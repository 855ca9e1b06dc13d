"""Names of checkpoints: short names, hub names, folders, and what is said without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.models import KNOWN_MODELS, load_pretrained, local_folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Record what would be downloaded; the download is an empty folder."""
    asked: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        assert "*.json" in allow_patterns
        assert not any(pattern.endswith((".bin", ".pth", ".gguf")) for pattern in allow_patterns)
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_have_hub_names_and_the_published_settings(name: str) -> None:
    known = KNOWN_MODELS[name]
    assert name == name.lower()
    assert re.fullmatch(r"[\w-]+/[\w.-]+", known.hub_name)
    assert "gptq" in known.hub_name.lower()
    size = float(re.search(r"([\d.]+)b-gptq$", name).group(1))  # type: ignore[union-attr]
    assert known.rank == (32 if size >= 32 else 64)
    assert known.omega == 0.75 * known.rank


@pytest.mark.parametrize("name", ["qwen2.5-14b-gptq", "Qwen2.5-14B-GPTQ", "QWEN2.5-14b-gptq"])
def test_known_names_are_found_in_any_case(downloads: list[str], name: str, tmp_path: Path) -> None:
    assert local_folder(name) == tmp_path
    assert downloads == ["Qwen/Qwen2.5-14B-Instruct-GPTQ-Int4"]


def test_a_hub_name_is_downloaded_as_it_is(downloads: list[str], tmp_path: Path) -> None:
    assert local_folder("owner/Some-Model") == tmp_path
    assert downloads == ["owner/Some-Model"]


def test_a_folder_is_taken_as_it_is_even_if_its_name_is_known(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qwen2.5-14b-gptq").mkdir()
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("qwen2.5-14b-gptq", "owner/model", str(tmp_path), tmp_path):
        assert local_folder(name) == Path(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/owner") == tmp_path / "owner"
    assert downloads == []


@pytest.mark.parametrize(
    "name", ["", "qwen2.5-13b", "/no/such/folder", "./owner/model", "~/nowhere/model", "a/b/c", "owner/"]
)
def test_what_is_neither_a_folder_nor_a_name_is_not_looked_up(downloads: list[str], name: str) -> None:
    with pytest.raises(
        CheckpointError, match=re.escape(f"--model {name}: no such folder, and not a known name")
    ) as found:
        local_folder(name)
    assert "qwen2.5-14b-gptq" in str(found.value)
    assert downloads == []


def test_a_file_is_said_to_be_no_folder(tmp_path: Path, downloads: list[str]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a folder\. Pass the folder that holds it"):
        local_folder(file)
    assert downloads == []


def offline(name: str, cache: Path) -> str:
    """What is said about ``name`` by a process that may not use the network, with an empty cache."""
    code = (
        "import sys\n"
        "from lotaqaf_jax.errors import CheckpointError\n"
        "from lotaqaf_jax.models import load_pretrained\n"
        "try:\n    load_pretrained(sys.argv[1])\n"
        "except CheckpointError as problem:\n    print(problem)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", code, name]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_without_a_network_the_message_says_which_folder_to_pass(tmp_path: Path) -> None:
    said = offline("qwen2.5-0.5b-gptq", tmp_path)
    hub_name = "Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4"
    assert said.startswith(
        f"--model qwen2.5-0.5b-gptq: no such folder, and {hub_name} could not be downloaded from the hub"
    )
    assert "pass its folder: --model /path/to/Qwen2.5-0.5B-Instruct-GPTQ-Int4" in said


def test_a_relative_path_that_looks_like_a_hub_name_is_said_to_be_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, allow_patterns: list[str]) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        CheckpointError, match=r"--model output/merged: no such folder, and output/merged could not be"
    ) as e:
        load_pretrained("output/merged")
    assert isinstance(e.value.__cause__, OSError)
