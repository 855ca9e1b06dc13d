"""evaluate.py as its users run it: what it measures, prints and writes, and what it says to bad input."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
import evaluate
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model
from tests.evaluation.test_multiple_choice import write_mmlu
from tests.training.conftest import tiny_gptq, write_rows

__all__ = ["tiny_gptq"]  # a fixture

TEXT = "After one comes two, and after two comes three; so it goes on and on, and never ends.\n\n" * 4


@pytest.fixture(scope="module")
def adapter(tiny_gptq: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter of the tiny model, and the folder that it is merged into, with an offset beside."""
    base = CheckpointFolder(tiny_gptq)
    folder = tmp_path_factory.mktemp("adapted")
    model = adapter_model(base)
    convert.save_adapter(model, folder / "adapter", base=base, progress=False)
    convert.merge_and_save(model, folder / "merged", base=base, progress=False)
    assert (folder / "merged" / "offset_adapter").is_dir()
    return folder / "adapter", folder / "merged"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file or folder for every kind of task."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    write_rows(folder / "rows.jsonl", 6)
    write_mmlu(folder / "mmlu", questions=2, shots=1)
    (folder / "gsm8k").mkdir()
    rows = [
        {"question": f"{i} and {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(5)
    ]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "gsm8k" / "train.jsonl").write_text(json.dumps({"question": "no", "answer": "not this"}) + "\n")
    (folder / "viggo.csv").write_text(
        'mr,ref\n"inform(name[A], genres[b, c])",A is b and c.\n"give_opinion(name[B])",B.\n'
    )
    rows = [{"question": "how many?", "context": "CREATE TABLE t (n INTEGER)", "answer": "SELECT COUNT(n) FROM t"}]
    (folder / "sql.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return folder


def run(tmp_path: Path, *flags: Any) -> dict[str, Any]:
    """The record of a run, and under "rows" its outcomes."""
    output, rows = tmp_path / "results.json", tmp_path / "rows.jsonl"
    given = [*map(str, flags), "--output", str(output), "--write_out", str(rows), "--overwrite"]
    assert evaluate.main(given) == 0
    record = json.loads(output.read_text())
    assert record["command"] == ["evaluate.py", *given]
    record["rows"] = [json.loads(line) for line in rows.read_text().splitlines()]
    return record


def test_every_task(tiny_gptq: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"gsm8k:{data / 'gsm8k'}", f"viggo:{data / 'viggo.csv'}", f"sql:{data / 'sql.jsonl'}"]
    names += [f"match:{data / 'rows.jsonl'}", f"mmlu:{data / 'mmlu'}"]
    names += [f"perplexity:{data / 'text.txt'}", f"document_perplexity:{data / 'text.txt'}"]
    settings = ["--max_new_tokens", 4, "--shots", 1, "--window", 32, "--limit", 5]
    record = run(tmp_path, "--model", tiny_gptq, "--tasks", *names, *settings)
    printed = capsys.readouterr().out
    found = {one["kind"]: one for one in record["results"]}
    assert list(found) == ["gsm8k", "viggo", "sql", "match", "mmlu", "perplexity", "document_perplexity"]
    for one in found.values():
        for name, measure in one["measures"].items():
            assert math.isfinite(measure["value"])
            assert measure["low"] is None or measure["low"] <= measure["value"] <= measure["high"]
            assert name in printed or name.startswith("accuracy/")
    assert found["gsm8k"]["counts"]["rows"] == 5, "the test file of the folder"
    assert found["mmlu"]["counts"]["questions"] == 6
    assert found["perplexity"]["counts"]["windows"] == 5
    # Every row's outcome, and shares that are those of the rows.
    for kind, measure in (("gsm8k", "exact_match"), ("match", "exact_match"), ("mmlu", "accuracy")):
        task = next(name for name in names if name.startswith(kind))
        right = [row["correct"] for row in record["rows"] if row["task"] == task]
        assert np.mean(right) == found[kind]["measures"][measure]["value"]
    losses = [row for row in record["rows"] if row["task"].startswith("perplexity:")]
    mean = sum(row["loss"] for row in losses) / sum(row["tokens"] for row in losses)
    assert mean == pytest.approx(found["perplexity"]["measures"]["loss"]["value"])
    # What is needed to repeat it.
    assert record["settings"]["window"] == 32
    assert record["settings"]["dtype"] == "float32"
    assert {"jax", "flax", "transformers", "datasets"} <= record["environment"]["packages"].keys()
    weights = hashlib.sha256((tiny_gptq / "model.safetensors").read_bytes()).hexdigest()
    assert record["model"]["files"]["model.safetensors"] == weights
    text = hashlib.sha256((data / "text.txt").read_bytes()).hexdigest()
    assert found["perplexity"]["data"]["files"] == {"text.txt": text}
    assert set(found["mmlu"]["data"]["files"]) == {"test.jsonl", "dev.jsonl"}


@pytest.mark.optimized
def test_adapter_and_merged_model_measure_the_same(
    tiny_gptq: Path, adapter: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    """Bit for bit, on the path that training takes; and not what the base gives."""
    tasks = ["--tasks", f"perplexity:{data / 'text.txt'}", "--window", 32]
    of_base = run(tmp_path, "--model", tiny_gptq, *tasks)
    of_adapter = run(tmp_path, "--model", tiny_gptq, "--adapter", adapter[0], *tasks)
    of_merged = run(tmp_path, "--model", adapter[1], *tasks)
    losses = [[row["loss"] for row in record["rows"]] for record in (of_base, of_adapter, of_merged)]
    assert losses[1] == losses[2]
    assert losses[0] != losses[1]
    fingerprints = {record["model"]["fingerprint"] for record in (of_base, of_adapter, of_merged)}
    assert len(fingerprints) == 3
    assert run(tmp_path, "--model", tiny_gptq, *tasks)["model"]["fingerprint"] in fingerprints
    assert "adapter_model.safetensors" in of_adapter["model"]["adapter_files"]
    assert "offset_adapter/lota_offset.safetensors" in of_merged["model"]["files"]


def test_a_16_bit_model(data: Path, tmp_path: Path) -> None:
    from tests.evaluation.conftest import make_pair

    pair = make_pair(tmp_path / "dense")
    record = run(tmp_path, "--model", pair.folder, "--tasks", f"perplexity:{data / 'text.txt'}", "--window", 64)
    import torch

    ids = pair.tokenizer(TEXT).input_ids
    windows = [torch.tensor([ids[i : i + 64]]) for i in range(0, len(ids) - 63, 64)]
    with torch.no_grad():
        losses = [float(pair.theirs(row, labels=row).loss) for row in windows]
    assert record["results"][0]["measures"]["loss"]["value"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_shipped_model_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(tmp_path, "--limit", 4, "--max_new_tokens", 8)
    assert record["results"][0]["counts"]["rows"] == 4
    assert "match:heldout.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--tasks", "arc"], "unknown task 'arc'"),
        (["--tasks", "match"], "match:PATH"),
        (["--tasks", "document_perplexity"], "document_perplexity:PATH"),
        (["--tasks", "gsm8k:nowhere"], "nowhere"),
        (["--tasks", "perplexity:{data}/rows.jsonl"], "column 'text'"),
        (["--tasks", "gsm8k:{data}/rows.jsonl"], "unknown columns"),
        (["--tasks", "mmlu:{data}/mmlu"], "abstract_algebra has 1 questions in dev"),
        (["--tasks", "match:{data}/rows.jsonl", "--max_new_tokens", "512"], "max_new_tokens: found 512"),
        (["--tasks", "match:{data}/rows.jsonl", "--batch_size", "0"], "--batch_size: found 0"),
        (["--tasks", "match:{data}/rows.jsonl", "--adapter", "{data}"], "adapter_config.json"),
        (["--tasks", "match:{data}/rows.jsonl", "--output", "{data}/no/r.json"], "there is no folder"),
        (["--tasks", "match:{data}/rows.jsonl", "--output", "{data}/rows.jsonl"], "--overwrite"),
        (["--tasks", "match:{data}/rows.jsonl", "--output", "x.json", "--write_out", "./x.json"], "Name two files"),
        ([], "--tasks is missing"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    tiny_gptq: Path, data: Path, capsys: pytest.CaptureFixture[str], flags: list[str], names: str
) -> None:
    given = [flag.replace("{data}", str(data)) for flag in flags]
    assert evaluate.main(["--model", str(tiny_gptq), *given]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert names in error


def test_no_file_is_half_written(tmp_path: Path) -> None:
    """Values that JSON cannot hold stop the writing in the middle: what was there stays, and nothing lies beside."""
    from lotaqaf_jax.evaluation.record import write_record

    target = tmp_path / "r.json"
    target.write_text("old")
    with pytest.raises(TypeError):
        write_record(target, {"a": [1] * 10_000, "b": object()})
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
