"""train.py as its users run it: what it writes, what it prints, how it stops, and what it says to bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import convert
import train
from lotaqaf_jax.models import TARGET_MODULES, load_pretrained
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.peer import torch_model
from tests.training.conftest import tiny_gptq, write_rows

__all__ = ["tiny_gptq"]  # a fixture

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def flags(folder: Path, output: Path, rows: Path, **changes: Any) -> list[str]:
    """Of a run on two projections, which are compiled in half the time that all take."""
    given: dict[str, Any] = {
        "model": folder,
        "dataset": rows,
        "output_dir": output,
        "max_seq_length": 32,
        "per_device_train_batch_size": 4,
        "lora_r": 8,
        "recipe": "published",
        "omega": 2,
        "target_modules": ["q_proj", "down_proj"],
        "max_steps": 4,
        **changes,
    }
    values = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    return [part for key, value in values.items() for part in (f"--{key}", *map(str, value))]


@pytest.fixture(scope="module")
def finished(tiny_gptq: Path, run_dir: Path) -> Path:
    """The output of a whole run with held-out rows, on all projections."""
    rows = write_rows(run_dir / "rows.jsonl", 24)
    everything = flags(tiny_gptq, run_dir / "out", rows, val_size=4, target_modules=list(TARGET_MODULES))
    assert train.main(everything) == 0
    return run_dir / "out"


@pytest.mark.optimized
def test_writes_what_is_promised(finished: Path, tiny_gptq: Path) -> None:
    assert {"adapter", "merged", "trainer_log.jsonl", "training_loss.png"} <= {path.name for path in finished.iterdir()}
    records = [json.loads(line) for line in (finished / "trainer_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    base, merged = load_file(tiny_gptq / "model.safetensors"), load_file(finished / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert changed
    assert all(name.endswith(".qweight") for name in changed)
    assert (finished / "merged" / "tokenizer.json").read_bytes() == (tiny_gptq / "tokenizer.json").read_bytes()
    assert (finished / "merged" / "offset_adapter").is_dir()


def test_summary_tells_what_happened(tiny_gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    assert train.main(flags(tiny_gptq, tmp_path / "out", rows, val_size=4, offset="none")) == 0
    printed = capsys.readouterr().out
    for words in (
        "rank 8, omega 2, no offset",
        "held-out loss",
        "exact match",
        "moved",
        str(tmp_path / "out" / "merged"),
    ):
        assert words in printed
    assert not (tmp_path / "out" / "merged" / "offset_adapter").exists()


@pytest.fixture(scope="module")
def tiny_dense(tiny_gptq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 16 bit, dequantised."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    torch_model(load_pretrained(tiny_gptq, dtype="float32", progress=False)).half().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_gptq / file, folder)
    return folder


def baseline(folder: Path, output: Path, rows: Path, method: str, **changes: Any) -> list[str]:
    given = flags(folder, output, rows, method=method, learning_rate=5e-3, **changes)
    place = given.index("--recipe")
    assert given[place + 2] == "--omega"
    return given[:place] + given[place + 4 :]


@pytest.mark.parametrize("kind", ["quantised", "16 bit"])
def test_lora_writes_an_adapter_for_peft(
    tiny_gptq: Path, tiny_dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    base = tiny_gptq if kind == "quantised" else tiny_dense
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    assert train.main(baseline(base, tmp_path / "out", rows, "lora", val_size=4)) == 0
    printed = capsys.readouterr().out
    for words in (
        "LoRA of rank 8, alpha 16",
        "learning rate 0.005 constant",
        "merged model           none",
        "held-out",
    ):
        assert words in printed
    assert not (tmp_path / "out" / "merged").exists()
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    folder = CheckpointFolder(base)
    plain = load_pretrained(base, dtype="float32", progress=False)
    adapted = convert.load_adapter(plain, tmp_path / "out" / "adapter", base=folder)
    ids = np.arange(24).reshape(2, 12)
    assert not np.array_equal(adapted(ids), plain(ids))


def test_qalora_writes_a_merged_model_whose_zero_points_moved(
    tiny_gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    assert train.main(baseline(tiny_gptq, tmp_path / "out", rows, "qalora")) == 0
    printed = capsys.readouterr().out
    for words in ("QA-LoRA of rank 8", "bit-identical to the adapter model's", "0.0000% moved"):
        assert words in printed
    merged = tmp_path / "out" / "merged"
    base, written = load_file(tiny_gptq / "model.safetensors"), load_file(merged / "model.safetensors")
    for name, tensor in base.items():
        np.testing.assert_array_equal(tensor, written[name])
    plain = load_pretrained(tiny_gptq, dtype="float32", progress=False)
    adapted = convert.load_adapter(plain, tmp_path / "out" / "adapter", base=CheckpointFolder(tiny_gptq))
    ids = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(convert.load_merged(merged, dtype="float32")(ids), adapted(ids))
    assert not np.array_equal(adapted(ids), plain(ids))


@pytest.mark.parametrize("method", ["lota", "qalora"])
def test_a_model_in_16_bit_has_no_grid(
    tiny_dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    given = flags(tiny_dense, tmp_path / "out", rows)
    given = given if method == "lota" else baseline(tiny_dense, tmp_path / "out", rows, "qalora")
    assert train.main(given) == 2
    assert "quantised" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists()


def test_dry_run_shows_the_mask_and_writes_nothing(
    tiny_gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    assert train.main([*flags(tiny_gptq, tmp_path / "out", rows), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "6 examples" in printed
    assert any(line.lstrip().startswith("loss") for line in printed.splitlines())
    assert not (tmp_path / "out").exists()


def test_output_that_is_not_empty(tiny_gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    (output / "trainer_log.jsonl").write_text("old\n")
    assert train.main(flags(tiny_gptq, output, rows)) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert (output / "trainer_log.jsonl").read_text() == "old\n"
    assert train.main([*flags(tiny_gptq, output, rows), "--overwrite_output_dir"]) == 0
    assert (output / "mine.txt").read_text() == "keep"
    assert "old" not in (output / "trainer_log.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model": "nowhere"}, "nowhere"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"lora_r": 1}, "rank"),
        ({"omega": 8}, "omega"),
        ({"method": "lora"}, "--recipe: is a setting of --method lota, found with --method lora"),
        ({"learning_rate": 1e-3}, "--learning_rate: is a setting of --optimizer ternary_adam"),
        ({"target_modules": "x_proj"}, "x_proj"),
        ({"max_samples": 0}, "max_samples"),
        ({"val_size": 100}, "val_size"),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint"),
    ],
)
def test_bad_settings_leave_with_a_sentence(
    tiny_gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], names: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    assert train.main(flags(tiny_gptq, tmp_path / "out", rows, **change)) == 2
    said = capsys.readouterr().err
    sentence = said[said.index("error: ") :]
    assert names in sentence
    assert not (tmp_path / "out" / "merged").exists()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "line 2"),
        ('{"question": "a", "reply": "b"}\n', "reply"),
    ],
)
def test_bad_rows_leave_with_a_sentence(
    tiny_gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, names: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text)
    assert train.main(flags(tiny_gptq, tmp_path / "out", rows)) == 2
    said = capsys.readouterr().err
    assert names in said[said.index("error: ") :]


def test_truncated_model(tiny_gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_gptq, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    assert train.main(flags(folder, tmp_path / "out", rows)) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_from_it(tiny_gptq: Path, run_dir: Path) -> None:
    """The real process, the real signal: the resumed run ends with the adapters of one that was never stopped."""
    rows = write_rows(run_dir / "signal.jsonl", 24)
    command = [sys.executable, str(ROOT / "train.py")]
    # Compiled as the runs in this process are, which find the program where the other one left it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    stopped = flags(tiny_gptq, run_dir / "stopped", rows, max_steps=120, logging_steps=1)
    process = subprocess.Popen([*command, *stopped], env=environment, stderr=subprocess.PIPE, text=True)
    log = run_dir / "stopped" / "trainer_log.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "--resume_from_checkpoint latest" in said
    assert not (run_dir / "stopped" / "merged").exists()

    assert train.main([*stopped, "--resume_from_checkpoint", "latest"]) == 0
    assert train.main(flags(tiny_gptq, run_dir / "whole", rows, max_steps=120, logging_steps=1)) == 0
    one = load_file(run_dir / "stopped" / "adapter" / "adapter_model.safetensors")
    other = load_file(run_dir / "whole" / "adapter" / "adapter_model.safetensors")
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 121))
