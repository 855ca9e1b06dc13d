"""python -m lotaqaf_jax.plan as its users run it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lotaqaf_jax.models import KNOWN_MODELS, PRESETS, preset
from lotaqaf_jax.plan.command import main, published_rank, read_shape
from tests.training.conftest import CHECKPOINTS

ROOT = Path(__file__).parents[2]
ACT_ORDER = CHECKPOINTS / "ckpt-llama-b4g32-asym-desc"


def run(capsys: pytest.CaptureFixture[str], *flags: Any) -> tuple[int, str, str]:
    status = main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "lotaqaf_jax.plan", "--model", "llama-3.3-70b", "--gpu", "h100", "--count", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "llama-3.3-70b on 1 x h100: data 1, fsdp 1, tensor 1" in done.stdout
    assert "fits. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in done.stdout
    assert "not measured" in done.stdout


def test_tables_show_every_part_and_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--model", "qwen2.5-14b", "--gpu", "h200", "--group_size", 64, "--batch", 8)
    assert status == 0
    memory, time = out.split("time of an update")
    for text, parts in ((memory, ("words", "scales", "optimizer", "saved", "reserve")), (time, ("forward", "weights"))):
        sizes = {name: float(size) for name, size in re.findall(r"^  (\w+) +([\d.]+)", text, re.M)}
        assert sizes.keys() >= set(parts)
        together = sizes.pop("together")
        assert sum(sizes.values()) == pytest.approx(together, abs=0.06)
    assert "8 x 1024 tokens at once on a card, 8 rows in an update" in out


def test_json_is_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "llama-3.1-8b", "--gpu", "a100-80", "--count", 8, "--fsdp", 8, "--recompute", "block", "--json")
    status, out, _ = run(capsys, *flags)
    told = json.loads(out)
    assert (status, told["fits"], told["advice"]) == (0, True, [])
    assert told["layout"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert told["settings"]["recompute"] == "block"
    assert told["settings"]["float8"] is False  # an A100 has none
    assert told["rows"] == 64


def test_what_does_not_fit_is_told_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--model", "llama-3.1-405b", "--gpu", "h100", "--count", 4)
    assert status == 1
    verdict, settings, cards = out.splitlines()[-3:]
    assert verdict == "does not fit."
    assert settings.startswith("would fit: --rank 16")
    for line in (settings, cards):
        again = line.removeprefix("would fit: ").split()
        again = again if "--count" in again else ["--count", "4", *again]
        assert run(capsys, "--model", "llama-3.1-405b", "--gpu", "h100", *again)[0] == 0


def test_a_folder_is_planned_as_it_is_held(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = read_shape(str(ACT_ORDER))
    (quant,) = {linear.quant for _, linear in shape.spec.layers[0]}
    assert quant is not None
    assert (quant.bits, quant.group_size, quant.act_order) == (4, 32, True)
    assert run(capsys, "--model", ACT_ORDER, "--gpu", "rtx4090")[0] == 0
    # Its config alone says nearly as much; flags win over it.
    for name in ("config.json", "quantize_config.json"):
        if (ACT_ORDER / name).exists():
            shutil.copy(ACT_ORDER / name, tmp_path)
    (linear,) = {linear for path, linear in read_shape(str(tmp_path)).spec.layers[0] if path == "mlp.up_proj"}
    assert linear.quant is not None
    assert (linear.quant.bits, linear.quant.group_size) == (4, 32)
    (linear,) = {linear for path, linear in read_shape(str(tmp_path), 2, 16).spec.layers[0] if path == "mlp.up_proj"}
    assert linear.quant is not None
    assert (linear.quant.bits, linear.quant.group_size) == (2, 16)


@pytest.mark.parametrize("name", PRESETS)
def test_the_rank_is_the_papers(name: str) -> None:
    expected = KNOWN_MODELS[f"{name}-gptq"].rank if f"{name}-gptq" in KNOWN_MODELS else 32
    assert published_rank(preset(name)) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama-9b", "--gpu", "h100"], "--model llama-9b: no such folder, and no size of: qwen2.5-0.5b"),
        (["--model", "llama-3.1-8b", "--gpu", "v100"], "--gpu: found 'v100', expected one of: a100-40, a100-80, h100"),
        (["--model", "llama-3.1-8b", "--gpu", "h100", "--count", "0"], "--count: found 0, expected 1 or more"),
        (["--model", "llama-3.1-8b", "--gpu", "h100", "--bits", "5"], "--bits"),
        (["--model", "llama-3.1-8b", "--gpu", "h100", "--fsdp", "3"], "expected data * fsdp * tensor"),
        (["--model", "llama-3.1-8b", "--gpu", "h100", "--rank", "-1"], "--rank: found -1, expected 1 or more"),
        (["--model", "{empty}", "--gpu", "h100"], "config.json: no such file"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], message: str
) -> None:
    status, out, err = run(capsys, *(flag.replace("{empty}", str(tmp_path)) for flag in flags))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
