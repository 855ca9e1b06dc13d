"""The card of an exported folder says what it is, what was measured, and how each runtime loads it, or why not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import convert
from convert.verify import Report
from lotaqaf_jax.models import Decoder, merge
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model, checkpoint


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_card_of_a_merge_has_what_verify_found(exported: tuple[Path, Report]) -> None:
    folder, report = exported
    card = (folder / "README.md").read_text()
    assert f"integers     {report.moved_share:.4%} moved" in section(card, "Measured")
    assert "bit-identical to the adapter model's" in section(card, "Measured")
    loading = section(card, "Loading")
    # With its offset, by PEFT; and nothing of the folder that it was written in.
    assert f'PeftModel.from_pretrained(model, "{folder.name}/offset_adapter")' in loading
    assert "adapter=Lora(" in loading
    assert set(re.findall(r'from_pretrained\("([^"]+)"', loading)) == {folder.name}
    assert "partial" not in card
    assert str(folder.parent) not in card


def test_how_it_was_trained_goes_with_the_adapter(base: CheckpointFolder, model: Decoder, tmp_path: Path) -> None:
    lines = ["optimizer    one of mine, 7 steps", "dataset      rows.jsonl"]
    convert.save_adapter(model, tmp_path / "adapter", base=base, training=lines, progress=False)
    flags = ["--model", str(base.path), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    assert main(["merge", *flags, "--quiet"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert section(card, "Training").split("\n")[1:3] == [f"    {line}" for line in lines]


def main(arguments: list[str]) -> int:
    from convert.__main__ import main

    return main(arguments)


@pytest.mark.parametrize(
    ("target", "loads", "refused"),
    [
        ("mlx", ["mlx-lm"], ["vLLM", "SGLang", "transformers", "GPTQModel", "llama.cpp", "onnxruntime-genai"]),
        ("awq", ["vLLM", "SGLang", "transformers", "GPTQModel", "mlx-lm"], ["llama.cpp", "onnxruntime-genai"]),
        ("hf16", ["vLLM", "SGLang", "transformers", "mlx-lm"], ["GPTQModel", "llama.cpp", "onnxruntime-genai"]),
    ],
)
def test_a_runtime_has_lines_or_a_reason(tmp_path: Path, target: str, loads: list[str], refused: list[str]) -> None:
    path = checkpoint("ckpt-llamapos-b4g32-asym")
    assert path is not None
    base = CheckpointFolder(path)
    model = merge(adapter_model(base, offset="none"))
    report = convert.save_pretrained(
        model, tmp_path / "out", base=base, target=target, allow_lossy=True, progress=False
    )
    card = (tmp_path / "out" / "README.md").read_text()
    for line in str(report).splitlines():
        assert f"    {line}" in card
    parts = dict(re.findall(r"\*\*([\w.-]+)\*\* [^:\n]+:(.*?)(?=\n\*\*|\Z)", section(card, "Loading"), re.DOTALL))
    assert [name for name in parts if "```" in parts[name]] == loads
    assert [name for name in parts if parts[name].startswith(" no. ")] == refused


@pytest.mark.parametrize("target", ["mlx", "awq", "hf16", "base"])
def test_a_base_and_an_adapter_give_the_share_that_verify_finds(tmp_path: Path, target: str) -> None:
    path = checkpoint("ckpt-llamapos-b4g32-asym")
    assert path is not None
    base = CheckpointFolder(path)
    model = adapter_model(base, offset="none")
    proven = convert.merge_and_save(model, tmp_path / "merged", base=base, progress=False)
    convert.save_adapter(model, tmp_path / "adapter", base=base, progress=False)
    flags = ["export", "--target", target, "--allow-lossy", "--quiet", "--report", str(tmp_path / "report.json")]
    flags += ["--model", str(base.path), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    assert main(flags) == 0
    line = f"integers     {proven.moved_share:.4%} moved from the base's, none by more than 1 step"
    assert line in section((tmp_path / "out" / "README.md").read_text(), "Measured")
    said = json.loads((tmp_path / "report.json").read_text())
    assert (said["moved_share"], said["largest_move"]) == (proven.moved_share, proven.largest_move)


def test_a_merged_folder_says_nothing_of_moves_that_were_not_measured(tmp_path: Path) -> None:
    path = checkpoint("ckpt-llamapos-b4g32-asym")
    assert path is not None
    flags = ["export", "--target", "awq", "--quiet", "--model", str(path), "--output", str(tmp_path / "out")]
    assert main(flags) == 0
    assert "integers" not in section((tmp_path / "out" / "README.md").read_text(), "Measured")
