"""The table of docs/results.md: its plan, the choice of learning rates, and what is made of results."""

from __future__ import annotations

import fcntl
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.fingerprint import fingerprint
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.training import parse_config

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def result_of(run: Any, loss: float, **more: Any) -> dict[str, Any]:
    look = {"loss": loss, "exact_match": 0.25}
    return {"name": run.name, **vars(run), "before": {"loss": 2.0, "exact_match": 0.0}, "after": look, **more}


def test_runs_have_names_of_their_own_and_flags_that_train_py_takes(tmp_path: Path) -> None:
    plan = importlib.import_module("table_plan")
    tuning = plan.tuning_runs(list(plan.SOURCES))
    best = {(run.source, run.bits, run.group_size, run.task, run.row): run.value for run in tuning}
    runs = tuning + plan.main_runs(list(plan.SOURCES), best)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        config = parse_config(run.flags(tmp_path, tmp_path))
        assert config.method == {"lora16": "lora", "lora": "lora", "qalora": "qalora"}.get(run.row, "lota")
        assert config.train_batch_size == 64
        assert config.eval_dataset is not None
        assert f"{run.task}_{run.split}.jsonl" in config.eval_dataset
        tuning = plan.ROWS[run.row].tuning
        if tuning is not None and tuning.values(run.task):
            assert getattr(config, tuning.flag) == run.value
        elif tuning is not None:
            assert (getattr(config, tuning.flag), run.value) == (tuning.on_text, None)
        elif not plan.ROWS[run.row].ablation:
            assert (config.learning_rate, config.moved, run.value) == (None, None, None)
        if run.row == "published":
            assert config.threshold == {"viggo": 56}.get(run.task, 48)
    assert {run.seed for run in runs if run.split == "test"} == {0, 1, 2}
    assert all(run.split == "test" or run.seed == 0 for run in runs)


def test_a_setting_is_chosen_by_validation_rows_alone() -> None:
    plan, report = (importlib.import_module(name) for name in ("table_plan", "table_report"))
    losses = {1e-3: 0.9, 2e-3: 0.8, 4e-3: float("nan")}
    results = [result_of(plan.Run("base14m", 4, 64, "gsm8k", "lora", 0, "validation", r), x) for r, x in losses.items()]
    results.append(result_of(plan.Run("base14m", 4, 64, "gsm8k", "lora", 0, "test", 1e-3), 0.1))
    assert report.best_values(results) == {("base14m", 4, 64, "gsm8k", "lora"): 2e-3}
    chosen = plan.main_runs(["base14m"], report.best_values(results))
    assert {run.value for run in chosen if (run.row, run.task, run.bits) == ("lora", "gsm8k", 4)} == {2e-3}
    assert not [run for run in chosen if run.row == "lora" and run.bits == 3]


def test_a_run_whose_setting_is_no_longer_the_best_is_left_out(tmp_path: Path) -> None:
    plan, report = (importlib.import_module(name) for name in ("table_plan", "table_report"))

    def results(*rates: float) -> list[dict[str, Any]]:
        cell = ("base14m", 4, 64, "stories", "lora", 0)
        tuned = [result_of(plan.Run(*cell, "validation", rate), 1 / rate) for rate in rates]
        return tuned + [result_of(plan.Run(*cell, "test", rate), 1.5 + rate) for rate in rates]

    report.write_report(results(0.25), tmp_path)
    assert "| GPTQ + LoRA | 1.7500 |" in (tmp_path / "table.md").read_text()
    report.write_report(results(0.25, 0.5), tmp_path)
    assert "| GPTQ + LoRA | 2.0000 |" in (tmp_path / "table.md").read_text()


def test_where_answers_are_compared_they_are_what_is_tuned_for() -> None:
    plan, report = (importlib.import_module(name) for name in ("table_plan", "table_report"))
    cases = {0.1: (0.50, 0.03), 0.2: (0.60, 0.05), 0.4: (0.60, 0.04)}
    results = [
        result_of(
            plan.Run("base14m", 4, 64, "viggo", "none", 0, "validation", moved), loss, exact_match={"value": match}
        )
        for moved, (match, loss) in cases.items()
    ]
    best = report.best_values(results)
    assert best == {("base14m", 4, 64, "viggo", "none"): 0.4}
    chosen = [run for run in plan.main_runs(["base14m"], best) if (run.task, run.bits) == ("viggo", 4)]
    assert {run.group_size for run in chosen if run.value} == {64}
    chosen = [run for run in chosen if run.group_size == 64]
    assert {run.row: run.value for run in chosen} == {
        "published": None, "reference": 0.4, "paper": 0.4, "default": None, "none": 0.4, "rank128": 0.4,
        "rounds": 0.4,
    }  # fmt: skip


def test_the_report_has_means_and_deviations_of_the_seeds(tmp_path: Path) -> None:
    plan, report = (importlib.import_module(name) for name in ("table_plan", "table_report"))
    results = [
        result_of(plan.Run("babyllama105", 3, 32, "stories", "none", seed), loss, moved=0.025, seconds=12.0)
        for seed, loss in enumerate((0.80, 0.82, 0.84))
    ]
    report.write_report(results, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| GPTQ |  | 2.0000 |  |" in lines
    assert "| LoTA-QAF, no offset |  | 0.8200 ± 0.0200 |  |" in lines
    assert any(line.startswith("| LoTA-QAF, no offset | 3 | 32 | 2.50% |") and line.endswith("| 3 |") for line in lines)
    assert (tmp_path / "babyllama105_stories.png").stat().st_size > 1000


def test_a_finished_run_is_read_and_a_failed_one_leaves_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, plan = importlib.import_module("table"), importlib.import_module("table_plan")
    import train

    def run_of(flags: list[str]) -> int:
        folder = Path(flags[flags.index("--output_dir") + 1])
        (folder / "merged").mkdir(parents=True)
        (folder / "merged" / "model.safetensors").write_bytes(b"12345")
        lines = [{"eval_loss": 2.0, "eval_exact_match": 0.0}, {"loss": 1.0, "moved": 0.01}, {"eval_loss": 0.5}]
        (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    monkeypatch.setattr(train, "main", run_of)
    run = plan.Run("babyllama105", 3, 32, "stories", "none", 0)
    shutil.copytree(CHECKPOINTS / "ckpt-llama-b4g32-asym-desc", plan.quantized_folder(tmp_path, run))
    result = table.run_one(run, tmp_path, tmp_path, float("inf"))
    assert (result["before"]["loss"], result["after"], result["moved"]) == (2.0, {"loss": 0.5}, 0.01)
    assert result["merged_bytes"] == 5
    assert fingerprint(CheckpointFolder(plan.quantized_folder(tmp_path, run))).startswith(result["base"])
    assert json.loads(json.dumps(result))["name"] == run.name
    assert table.run_one(run, tmp_path, tmp_path, 0.0) is None

    monkeypatch.setattr(train, "main", lambda flags: 2)
    assert table.run_one(run, tmp_path, tmp_path, float("inf")) is None
    assert "train.py ended with status 2" in capsys.readouterr().err


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, plan = importlib.import_module("table"), importlib.import_module("table_plan")
    run = plan.Run("base14m", 4, 64, "viggo", "lora", 0, "validation", 2.5e-4)
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / f"{run.name}.log").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert table.run_one(run, tmp_path, tmp_path, float("inf")) is None
    assert "another process is at it" in capsys.readouterr().err


def test_a_round_starts_from_the_merged_model_of_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, plan = importlib.import_module("table"), importlib.import_module("table_plan")
    import evaluate
    import train

    seen: list[list[str]] = []

    def run_of(flags: list[str]) -> int:
        seen.append(flags)
        folder = Path(flags[flags.index("--output_dir") + 1])
        (folder / "merged").mkdir(parents=True)
        lines = [{"eval_loss": 3.0 - len(seen)}, {"loss": 1.0, "moved": 0.01}, {"eval_loss": 2.0 - len(seen)}]
        (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    measured: list[list[str]] = []
    monkeypatch.setattr(train, "main", run_of)
    monkeypatch.setattr(evaluate, "main", lambda flags: measured.append(flags) or 0)
    run = plan.Run("base14m", 4, 64, "viggo", "rounds", 0, "test", 0.4)
    shutil.copytree(CHECKPOINTS / "ckpt-llama-b4g32-asym-desc", plan.quantized_folder(tmp_path, run))
    result = table.run_one(run, tmp_path, tmp_path, float("inf"))
    assert (result["before"]["loss"], result["after"]["loss"]) == (2.0, 0.0)
    first, second = (parse_config(flags) for flags in seen)
    assert first.model == str(plan.quantized_folder(tmp_path, run))
    assert second.model == f"{first.output_dir}/merged"
    assert (first.num_train_epochs, second.num_train_epochs) == (3.0, 3.0)
    assert first.seed != second.seed
    assert measured[0][1] == f"{second.output_dir}/merged"
    assert not list((tmp_path / "runs").glob("*/"))


def test_a_16_bit_model_is_measured_where_it_was_trained_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, plan = importlib.import_module("table"), importlib.import_module("table_plan")
    import evaluate
    import train

    def run_of(flags: list[str]) -> int:
        folder = Path(flags[flags.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        lines = [{"eval_loss": 2.0, "eval_exact_match": 0.0}, {"loss": 1.0}, {"eval_loss": 0.5}]
        (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    seen: list[list[str]] = []
    monkeypatch.setattr(train, "main", run_of)
    monkeypatch.setattr(evaluate, "main", lambda flags: seen.append(flags) or 0)
    run = plan.Run("base14m", 16, 0, "viggo", "lora16", 0, "validation", 1e-3)
    assert table.run_one(run, tmp_path / "out", tmp_path / "data", float("inf")) is not None
    model = str(tmp_path / "data" / plan.SOURCES["base14m"].folder)
    assert seen[0][:2] == ["--model", model]
    assert seen[0][seen[0].index("--adapter") + 1].startswith(str(tmp_path / "out"))
    assert seen[0][seen[0].index("--tasks") + 1] == f"viggo:{tmp_path / 'out/data/viggo_validation.jsonl'}"
