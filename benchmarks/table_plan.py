"""What the table of docs/results.md is made of: models, tasks, rows, and the runs that they come to."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["ROWS", "SOURCES", "TASKS", "Row", "Run", "Source", "Task", "Tuning", "main_runs", "prepare", "tuning_runs"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A 16-bit model.

    Attributes:
        name: for files and tables.
        folder: below the data.
        calibration: the text it is quantised with, a file below the data, or without a folder of :func:`prepare`.
        groups: group sizes it is quantised with.
        tasks: names of :data:`TASKS`.
    """

    name: str
    folder: str
    calibration: str
    groups: tuple[int, ...]
    tasks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is fine-tuned on.

    Attributes:
        name: for files and tables.
        flags: of train.py.
        length: the flag of train.py that says how long, and its value.
        rule: the task of evaluate.py that compares texts; None where only the held-out loss counts.
        omega: the published threshold, as a share of the rank.
        by_match: whether settings are tuned for exact match, not for the loss. Not on GSM8K, where these models are
            right once in fifty rows, by chance.
    """

    name: str
    flags: tuple[str, ...]
    length: tuple[str, float]
    rule: str | None = None
    omega: float = 0.75
    by_match: bool = False


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The one setting of a row that is tuned on validation rows, with one seed.

    Attributes:
        flag: of train.py.
        text: values to try on plain text.
        tasks: values to try on tasks that are answered.
        on_text: what it is on plain text where none are tried.
    """

    flag: str
    text: tuple[float, ...]
    tasks: tuple[float, ...]
    on_text: float | None = None

    def values(self, task: str) -> tuple[float, ...]:
        """Those to try."""
        return self.text if TASKS[task].rule is None else self.tasks


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to fine-tune.

    Attributes:
        title: as the table says it.
        flags: of train.py, for a task and a rank.
        tuning: what is tuned, if anything.
        like: the row whose tuned value it takes; none: its own.
        dense: whether the model is the 16-bit one.
        ablation: whether it is one change to the recommended recipe, or to what it came from; at the first group size.
        on: "text", "tasks" that are answered, or both.
        rounds: into how many runs of train.py the steps are cut, each from the merged model of the last, so that an
            integer may move by so many steps.
    """

    title: str
    flags: tuple[str, ...]
    tuning: Tuning | None = None
    like: str | None = None
    dense: bool = False
    ablation: bool = False
    on: Literal["text", "tasks", "both"] = "both"
    rounds: int = 1


Cell = tuple[str, int, int, str, str]
"""(source, bits, group size, task, row)."""
RANK = 64
BITS = (4, 3, 2)
SEEDS = (0, 1, 2)
SOURCES = {
    "babyllama105": Source("babyllama105", "checkpoints/babyllama105", "stories_train.jsonl", (32,), ("stories",)),
    "base14m": Source(
        "base14m",
        "checkpoints/base14m-qwen2",
        "text/c4_demo.jsonl.gz",
        (64, 32),
        ("stories", "viggo", "sql", "gsm8k"),
    ),
}
_BATCH = ("--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "1")
TASKS = {
    "stories": Task("stories", (*_BATCH, "--max_seq_length", "256"), ("max_steps", 300)),
    "viggo": Task("viggo", _BATCH, ("num_train_epochs", 6), "viggo", omega=0.875, by_match=True),
    "sql": Task("sql", _BATCH, ("num_train_epochs", 1), "sql", by_match=True),
    "gsm8k": Task("gsm8k", (*_BATCH, "--max_seq_length", "512"), ("num_train_epochs", 3), "gsm8k"),
}
_LORA_RATE = Tuning("learning_rate", (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3), (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3))
_QALORA_RATE = Tuning("learning_rate", (5e-4, 1e-3, 2e-3, 5e-3, 1e-2), (5e-3, 1e-2, 2e-2, 4e-2))
_MOVED = Tuning("moved", (), (0.05, 0.1, 0.2, 0.4, 0.6), on_text=0.04)
_MOVED_ON_TEXT = Tuning("moved", (0.01, 0.02, 0.04, 0.08, 0.16), ())
_LORA = ("--method", "lora", "--lr_scheduler_type", "cosine")
_SIGN = ("--optimizer", "t_signsgd", "--surrogate", "straight")
_QALORA = ("--method", "qalora", "--qalora_pool", "mean", "--lr_scheduler_type", "cosine")
_change = functools.partial(Row, tuning=Tuning("moved", (), (), on_text=0.04), ablation=True, on="text")
_threshold = functools.partial(Row, ablation=True, on="text")
ROWS = {
    "lora16": Row("16 bit + LoRA", _LORA, _LORA_RATE, dense=True),
    "lora": Row("GPTQ + LoRA", _LORA, _LORA_RATE),
    "qalora": Row("QA-LoRA", _QALORA, _QALORA_RATE),
    "published": Row("LoTA-QAF, as published", ("--recipe", "published")),
    "reference": Row("LoTA-QAF, reference offset", ("--offset", "reference"), _MOVED, like="none"),
    "paper": Row("LoTA-QAF, paper offset", ("--offset", "paper"), _MOVED, like="none"),
    "default": Row("LoTA-QAF, all settings left out", ()),
    "none": Row("LoTA-QAF, no offset", ("--offset", "none"), _MOVED),
    "share": Row("LoTA-QAF, no offset, share tuned", ("--offset", "none"), _MOVED_ON_TEXT, on="text"),
    "rank128": Row("LoTA-QAF, no offset, rank 128", ("--lora_r", "128"), _MOVED, like="none"),
    "rounds": Row("LoTA-QAF, no offset, two rounds", (), _MOVED, like="none", ablation=True, on="tasks", rounds=2),
    "straight": _change("straight-through gradient", ("--surrogate", "straight")),
    "sign": _change("t-SignSGD, beta 0.9", ("--optimizer", "t_signsgd", "--beta", "0.9")),
    "omega12": _threshold("omega 12 for all matrices", ("--omega", "12")),
    "lead": _threshold("t-SignSGD, beta 0.9, straight, omega 12", (*_SIGN, "--omega", "12", "--beta", "0.9")),
    "moved2": _threshold("2 % to move", ("--moved", "0.02")),
    "moved8": _threshold("8 % to move", ("--moved", "0.08")),
    "rate005": _change("learning rate 0.05", ("--learning_rate", "0.05")),
    "rate05": _change("learning rate 0.5", ("--learning_rate", "0.5")),
    "constant": _change("constant learning rate", ("--lr_scheduler_type", "constant")),
    "rank32": _change("rank 32", ("--lora_r", "32")),
    "wide": _change("products in 16 bit, not float8", ("--float8", "false")),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of train.py: ``split`` is what it is measured on, ``value`` that of the tuned setting."""

    source: str
    bits: int
    group_size: int
    task: str
    row: str
    seed: int
    split: str = "test"
    value: float | None = None

    @property
    def name(self) -> str:
        """Of its folder; different for different runs."""
        value = "" if self.value is None else f"-{self.value:g}"
        return f"{self.source}-b{self.bits}g{self.group_size}-{self.task}-{self.row}{value}-s{self.seed}-{self.split}"

    def folder(self, root: Path, round: int | None = None) -> Path:
        """What train.py writes into, in the last round or the one given, counted from 0."""
        last = round is None or round == ROWS[self.row].rounds - 1
        return root / "runs" / (self.name if last else f"{self.name}-round{round}")

    def flags(self, root: Path, data: Path, round: int = 0) -> list[str]:
        """The command line of train.py.

        Args:
            root: of the quantised models, the split data, and the results.
            data: of the 16-bit models.
            round: which of the row's, counted from 0.
        """
        task, row = TASKS[self.task], ROWS[self.row]
        model = data / SOURCES[self.source].folder if row.dense else quantized_folder(root, self)
        if round:
            model = self.folder(root, round - 1) / "merged"
        files, (length, value) = root / "data", task.length
        flags = ["--model", str(model), "--dataset", _named(task, files / f"{task.name}_train.jsonl")]
        flags += ["--eval_dataset", _named(task, files / f"{task.name}_{self.split}.jsonl"), *task.flags]
        flags += [f"--{length}", f"{value / row.rounds:g}", "--lora_r", str(RANK), *row.flags]
        if self.row == "published":
            flags += ["--omega", f"{task.omega * RANK:g}"]
        tuning = row.tuning
        if tuning is not None:
            value = tuning.on_text if self.value is None else self.value
            flags += [] if value is None else [f"--{tuning.flag}", f"{value:g}"]
        # Another seed, because with the same one a later round would see the rows of the first.
        return [*flags, "--seed", str(self.seed + 1000 * round), "--output_dir", str(self.folder(root, round))]


def quantized_folder(root: Path, run: Run) -> Path:
    """Where the quantised model of a run lies."""
    return root / "models" / f"{run.source}-w{run.bits}g{run.group_size}"


def _named(task: Task, file: Path) -> str:
    return str(file) if task.rule is None else f"{task.rule}:{file}"


def _cells(sources: Sequence[str]) -> Iterator[tuple[Source, int, int, str]]:
    """(source, bits, group size, task), the first group size of all bits and tasks before the others."""
    for name in sources:
        source = SOURCES[name]
        for group_size in source.groups:
            for task in source.tasks:
                for bits in BITS:
                    yield source, bits, group_size, task


def tuning_runs(sources: Sequence[str]) -> list[Run]:
    """Every value to try of every row that is tuned, one seed, measured on validation rows."""
    runs = []
    for source, bits, group_size, task in _cells(sources):
        first = bits == BITS[0] and group_size == source.groups[0]
        for name, row in ROWS.items():
            if row.tuning is None or row.like or (row.dense and not first):
                continue
            place = (16, 0) if row.dense else (bits, group_size)
            runs += [Run(source.name, *place, task, name, 0, "validation", value) for value in row.tuning.values(task)]
    return runs


def main_runs(sources: Sequence[str], best: Mapping[Cell, float]) -> list[Run]:
    """Every cell of the table, seed by seed; a row that is not tuned yet is left out.

    Args:
        sources: names of :data:`SOURCES`.
        best: the tuned values.
    """
    runs = []
    for seed in SEEDS:
        for source, bits, group_size, task in _cells(sources):
            answered = TASKS[task].rule is not None
            for name, row in ROWS.items():
                first = bits == BITS[0] and group_size == source.groups[0]
                if (row.dense and not first) or row.on == ("text" if answered else "tasks"):
                    continue
                if row.ablation and group_size != source.groups[0]:
                    continue
                place = (16, 0) if row.dense else (bits, group_size)
                value = None
                if row.tuning is not None and row.tuning.values(task):
                    value = best.get((source.name, *place, task, row.like or name))
                    if value is None:
                        continue
                runs.append(Run(source.name, *place, task, name, seed, "test", value))
    return runs


def prepare(data: Path, files: Path) -> None:
    """Cut the data into train, validation and test rows, below ``files``.

    Stories: rows 0-299 test, 300-599 validation, the others training, newlines made spaces (a character model has
    none). ViGGO: its own three parts. SQL: the official 1,000 rows test; of the training rows the last 500 are
    validation. GSM8K: its own test rows; of the training rows the last 473 are validation.
    """
    if all((files / f"{task}_{split}.jsonl").exists() for task in TASKS for split in ("train", "validation", "test")):
        return
    files.mkdir(parents=True, exist_ok=True)
    stories = [
        {"text": row["text"].replace("\n", " ")} for row in _json_rows(data / "text/tinystories_sample.jsonl.gz")
    ]
    sql, gsm8k = _json_rows(data / "sql/train.jsonl.gz"), _json_rows(data / "gsm8k/train.jsonl.gz")
    parts = {
        "stories": (stories[600:], stories[300:600], stories[:300]),
        "viggo": tuple(_csv_rows(data / f"viggo/{split}.csv.gz") for split in ("train", "valid", "test")),
        "sql": (sql[:-500], sql[-500:], _json_rows(data / "sql/valid.jsonl.gz")),
        "gsm8k": (gsm8k[:-473], gsm8k[-473:], _json_rows(data / "gsm8k/test.jsonl.gz")),
    }
    for task, rows in parts.items():
        for split, part in zip(("train", "validation", "test"), rows, strict=True):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (files / f"{task}_{split}.jsonl").write_text(text, encoding="utf-8")


def _json_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    import csv

    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
