"""`python -m convert`: what it does, and one sentence with status 2 where it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.__main__ import main
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import checkpoint


def test_merge_then_verify(
    base: CheckpointFolder, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, report = str(base.path), str(tmp_path / "merged"), str(tmp_path / "report.json")
    assert main(["merge", "--model", model, "--adapter", str(adapter), "--output", out, "--report", report]) == 0
    assert "bit-identical to the adapter model's" in capsys.readouterr().out
    assert json.loads(Path(report).read_text())["largest_move"] == 1
    assert main(["verify", "--model", model, "--merged", out, "--adapter", str(adapter), "--quiet"]) == 0
    assert main(["verify", "--model", model, "--merged", out, "--quiet"]) == 0
    assert "not compared" in capsys.readouterr().out


def test_failed_check_fails_the_command(
    base: CheckpointFolder, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (merged / "tokenizer.json").write_text("{}")
    assert main(["verify", "--model", str(base.path), "--merged", str(merged)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "tokenizer.json" in error


def test_import_then_export_gives_the_same_tensors(base: CheckpointFolder, tmp_path: Path) -> None:
    imported, out = tmp_path / "imported", tmp_path / "out"
    assert main(["import", "--model", str(base.path), "--output", str(imported), "--quiet"]) == 0
    assert main(["export", "--model", str(imported), "--output", str(out), "--quiet"]) == 0
    written = CheckpointFolder(out)
    assert written.tensors.keys() == base.tensors.keys()
    for name in base.tensors:
        np.testing.assert_array_equal(written.read(name), base.read(name), err_msg=name)
    assert written.config == base.config
    assert (out / "tokenizer.json").read_bytes() == (base.path / "tokenizer.json").read_bytes()


def test_export_of_a_folder_is_a_copy(base: CheckpointFolder, tmp_path: Path) -> None:
    assert main(["export", "--model", str(base.path), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base.path / "model.safetensors").read_bytes()


def test_bad_input_is_one_sentence_and_status_2(
    base: CheckpointFolder, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = checkpoint("ckpt-llamapos-b4g32-asym")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").write_text("")
    out = str(tmp_path / "out")

    def refused(*arguments: str) -> str:
        assert main([*arguments, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "Traceback" not in error
        assert [path.name for path in tmp_path.iterdir()] == ["full"]
        return error

    merge = ("merge", "--model", str(base.path), "--adapter", str(adapter))
    assert "another base" in refused("merge", "--model", str(other), "--adapter", str(adapter), "--output", out)
    assert "not empty" in refused(*merge, "--output", str(full))
    assert "was not written by this" in refused(*merge, "--output", str(full), "--overwrite")
    assert "expected one of base, gptq" in refused(*merge, "--output", out, "--target", "floppy")
    assert "is, holds or lies in" in refused(*merge, "--output", str(base.path), "--overwrite")
    assert "no such folder" in refused("merge", "--model", "/nowhere", "--adapter", str(adapter), "--output", out)
    assert "no such file" in refused("merge", "--model", str(base.path), "--adapter", "/nowhere", "--output", out)


def test_disk_full_is_one_sentence_and_leaves_nothing(
    base: CheckpointFolder,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    out = tmp_path / "out"
    assert main(["merge", "--model", str(base.path), "--adapter", str(adapter), "--output", str(out), "--quiet"]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_interrupt_is_quiet(
    base: CheckpointFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.imported.copy_companions", interrupted)
    assert main(["import", "--model", str(base.path), "--output", str(tmp_path / "out"), "--quiet"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "import", "merge", "export", "verify"])
def test_help_names_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.count("default") + text.count("required") >= 4
