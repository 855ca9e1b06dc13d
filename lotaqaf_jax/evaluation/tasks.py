"""From a task's name to a result: the data it is measured on, and the function that measures it.

A name is ``gsm8k``, or ``gsm8k:PATH`` with data of one's own. The tasks:

====================  =====================================  =======================================================
name                  data                                   measured
====================  =====================================  =======================================================
gsm8k, sql, viggo     preset, or PATH in the preset's form   exact match by the rule of that name (:mod:`~.rules`)
match                 PATH: any dataset with responses       exact match of whole texts
mmlu                  the hub's, or PATH: folder             letters by option likelihood
perplexity            the hub's wikitext-2, or PATH: text    perplexity of joined text in windows
document_perplexity   PATH: rows with a text                 perplexity of every text alone
====================  =====================================  =======================================================

PATH is named as for training (:mod:`lotaqaf_jax.data.sources`): a file, a folder with a file for each split, or a hub
dataset. A ``.txt`` file of text is read whole, not line by line.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lotaqaf_jax.data import Rows, load_rows, make_examples
from lotaqaf_jax.data.sources import Row, find_split
from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.evaluation.config import EvalConfig
from lotaqaf_jax.evaluation.generated import exact_match
from lotaqaf_jax.evaluation.intervals import Measure
from lotaqaf_jax.evaluation.mmlu_data import load_mmlu
from lotaqaf_jax.evaluation.multiple_choice import mmlu
from lotaqaf_jax.evaluation.text_loss import document_perplexity, perplexity
from lotaqaf_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "Result", "Task", "TaskResult", "load_task"]

_SPLITS = ("test", "validation")
_WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"


class Result(Protocol):
    """What every evaluation gives."""

    @property
    def measures(self) -> Sequence[Measure]:
        """The numbers."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What else there is to know: rows, cuts, lengths."""

    def records(self) -> Sequence[Mapping[str, Any]]:
        """A row's outcome each."""


Measuring = Callable[[Decoder, "PreTrainedTokenizerBase"], Result]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its data at hand.

    Attributes:
        name: as it was given.
        kind: the task's own name, a key of :data:`TASKS`.
        data: what was read, for reports.
        split: of a folder or hub dataset; None for a single file.
        rows: how many rows the data has.
        files: the files read; none for a hub dataset.
        digest: for a hub dataset sha256 over its rows as JSON; None where there are files.
        measure: gives the result of a model.
    """

    name: str
    kind: str
    data: str
    split: str | None
    rows: int
    files: tuple[Path, ...]
    digest: str | None
    measure: Measuring

    @property
    def label(self) -> str:
        """A short name, for tables: of a path the last part."""
        _, colon, path = self.name.partition(":")
        return self.kind + (f":{Path(path).name}" if colon else "")

    def run(self, model: Decoder, tokenizer: PreTrainedTokenizerBase) -> TaskResult:
        """Measure a model."""
        started = time.perf_counter()
        result = self.measure(model, tokenizer)
        return TaskResult(self, result, time.perf_counter() - started)


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task, what came of it, and the seconds it took."""

    task: Task
    result: Result
    seconds: float


def load_task(name: str, config: EvalConfig) -> Task:
    """Read a task's data, so that mistakes in it are found before a model is loaded.

    Args:
        name: a key of :data:`TASKS`, or one with a path behind a colon.
        config: the settings.

    Raises:
        ConfigError: an unknown task, or one that needs a path.
        DataError: data that cannot be had, read or used.
    """
    kind, _, path = name.partition(":")
    if kind not in TASKS:
        raise ConfigError(f"--tasks {name}: unknown task {kind!r}, expected one of {', '.join(TASKS)}.")
    return TASKS[kind](name, kind, path or None, config)


def _generation(name: str, kind: str, path: str | None, config: EvalConfig) -> Task:
    if kind == "match" and path is None:
        raise ConfigError("--tasks match: names no data; give match:PATH, a dataset with prompts and responses.")
    dataset = name if kind != "match" else str(path)
    rows, split = _rows(dataset, path, config.split)
    examples = make_examples(dataclasses.replace(rows, rows=rows.rows[: config.limit]))

    def measure(model: Decoder, tokenizer: PreTrainedTokenizerBase) -> Result:
        return exact_match(
            model,
            tokenizer,
            examples,
            "text" if kind == "match" else kind,
            max_new_tokens=config.max_new_tokens,
            max_source_length=config.max_source_length,
            batch_size=config.batch_size,
            progress=kind,
        )

    return Task(name, kind, rows.name, split, len(rows.rows), rows.files, _digest(rows), measure)


def _mmlu(name: str, kind: str, path: str | None, config: EvalConfig) -> Task:
    split = config.split or "test"
    data = load_mmlu(path, split, shots=config.shots)

    def measure(model: Decoder, tokenizer: PreTrainedTokenizerBase) -> Result:
        return mmlu(
            model,
            tokenizer,
            data,
            shots=config.shots,
            limit=config.limit,
            max_length=config.max_length,
            batch_size=config.batch_size,
            progress=kind,
        )

    every = [*data.questions, *(one for shown in data.examples.values() for one in shown)]
    digest = None if data.files else _sha256([dataclasses.asdict(one) for one in every])
    is_file = path is not None and Path(path).is_file()
    return Task(name, kind, data.name, None if is_file else split, len(data.questions), data.files, digest, measure)


def _perplexity(name: str, kind: str, path: str | None, config: EvalConfig) -> Task:
    joined = kind == "perplexity"
    if path is None and not joined:
        raise ConfigError(f"--tasks {kind}: names no data; give {kind}:PATH, a dataset with a column 'text'.")
    dataset = path or _WIKITEXT
    whole = _text_files(dataset, config.split)
    if whole:
        rows = Rows(dataset, tuple(Row(file.name, {"text": _whole_text(file)}) for file in whole), (), whole)
        split = None
    else:
        rows, split = _rows(dataset, dataset, config.split)
    for row in rows.rows:
        if not isinstance(row.values.get("text"), str):
            raise DataError(f"{row.where}: column 'text' is {row.values.get('text')!r}; expected a string")
    texts = [row.values["text"] for row in rows.rows]

    def measure(model: Decoder, tokenizer: PreTrainedTokenizerBase) -> Result:
        return (perplexity if joined else document_perplexity)(
            model,
            tokenizer,
            texts,
            window=config.window,
            limit=config.limit,
            batch_size=config.batch_size,
            seed=config.seed,
            progress=kind,
        )

    return Task(name, kind, rows.name, split, len(rows.rows), rows.files, _digest(rows), measure)


TASKS: Mapping[str, Callable[[str, str, str | None, EvalConfig], Task]] = {
    "gsm8k": _generation,
    "sql": _generation,
    "viggo": _generation,
    "match": _generation,
    "mmlu": _mmlu,
    "perplexity": _perplexity,
    "document_perplexity": _perplexity,
}
"""What reads the data of each task."""


def _rows(dataset: str, path: str | None, split: str | None) -> tuple[Rows, str | None]:
    """The rows of the split that is asked for, or else of the first of :data:`_SPLITS` that a folder has."""
    place = Path(path).expanduser() if path else None
    if place is not None and place.is_file():
        return load_rows(dataset), None
    chosen = split or _SPLITS[0]
    if split is None and place is not None and place.is_dir():
        chosen = next((one for one in _SPLITS if _has_split(place, one)), chosen)
    return load_rows(dataset, chosen), chosen


def _has_split(folder: Path, split: str) -> bool:
    try:
        return bool(find_split(folder, split))
    except DataError:
        return False


def _text_files(dataset: str, split: str | None) -> tuple[Path, ...]:
    """The ``.txt`` files that a dataset's name means, if it means such."""
    path = Path(dataset).expanduser()
    files = [path] if path.is_file() else []
    if path.is_dir():
        chosen = split or next((one for one in _SPLITS if _has_split(path, one)), _SPLITS[0])
        files = find_split(path, chosen)
    return tuple(file for file in files if file.name.lower().removesuffix(".gz").endswith(".txt"))


def _whole_text(file: Path) -> str:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.name.lower().endswith(".gz") else file.read_bytes()
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as problem:
        raise DataError(f"file {str(file)!r} cannot be read as text: {problem}; fetch it again") from problem


def _digest(rows: Rows) -> str | None:
    return None if rows.files else _sha256([dict(row.values) for row in rows.rows])


def _sha256(items: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()
