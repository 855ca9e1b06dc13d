"""From the name of a dataset to its rows.

The rule for a name, first match wins:

1. ``gsm8k`` - a preset: its hub dataset. (A folder of that name is ``./gsm8k``.)
2. ``gsm8k:PATH`` - a preset with a local file or folder, which must have one of the preset's formats.
3. a path that exists - a file, or a folder with one file per split (see :func:`find_split`).
4. ``owner/name`` or ``owner/name:subset`` - a hub dataset.

Files are ``.json`` (a list of objects, or one object per line), ``.jsonl``, ``.csv`` (with a header),
``.parquet`` and ``.txt`` (a row per line that is not blank), each also with ``.gz``. They are read with
`datasets`_ in a temporary cache, so that nothing stale is ever used and nothing is left behind. JSON lines go
through its text reader and are parsed here, because its JSON reader guesses types (``"2020-01-01"`` becomes a
date) and cannot name the bad line.

.. _datasets: https://huggingface.co/docs/datasets
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lotaqaf_jax.data.formats import FORMATS, Example, detect_format
from lotaqaf_jax.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "EXTENSIONS",
    "PRESETS",
    "Examples",
    "Preset",
    "Row",
    "Rows",
    "find_split",
    "load_examples",
    "load_rows",
    "make_examples",
    "read_file",
]

EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet", ".txt")
"""What a file may end in; each also with ``.gz`` behind."""

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


class Row(NamedTuple):
    """A row and where it stands, for messages ("train.jsonl, line 3")."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of one dataset as they were found.

    Attributes:
        name: what was read, for reports.
        rows: the rows in file order.
        formats: names of the formats that they may have: the preset's, or all.
        files: the files read; none for a dataset of the hub.
    """

    name: str
    rows: tuple[Row, ...]
    formats: tuple[str, ...]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Preset:
    """A dataset known by name: where the hub has it, and the formats its editions come in."""

    hub: str
    formats: tuple[str, ...]
    subset: str | None = None
    revision: str | None = None


PRESETS: Mapping[str, Preset] = {
    "alpaca": Preset("yahma/alpaca-cleaned", ("alpaca",)),
    "gsm8k": Preset("openai/gsm8k", ("gsm8k",), subset="main"),
    "sql": Preset("b-mc2/sql-create-context", ("messages", "sql")),
    # The main branch holds a loading script, which `datasets` no longer runs; the hub keeps a converted copy.
    "viggo": Preset("GEM/viggo", ("viggo",), revision="refs/convert/parquet"),
}


@dataclass(frozen=True)
class Examples:
    """The examples of one dataset, and what was seen on the way.

    Attributes:
        name: what was read, for reports.
        format: the name of the format found.
        ignored_columns: the columns that the format does not use.
        examples: the examples in file order.
        where: for each example the place of its row.
        skipped: for each row left out, the sentence that says why.
    """

    name: str
    format: str
    ignored_columns: tuple[str, ...]
    examples: tuple[Example, ...]
    where: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def load_examples(
    dataset: str,
    split: str = "train",
    *,
    format: str | None = None,
    max_samples: int | None = None,
    skip_bad_rows: bool = False,
) -> Examples:
    """Read a dataset, find its format and make an example of each row.

    Args:
        dataset: name, file or folder; the module's docstring has the rule.
        split: of a folder or hub dataset.
        format: one of ``FORMATS``; None finds it from the columns.
        max_samples: only the first so many rows.
        skip_bad_rows: leave unusable rows out instead of raising.

    Raises:
        DataError: no such file, an extension or columns that are not known, a file that cannot be read, a row
            that cannot be used (with its place), no rows, or a hub dataset that cannot be had.
    """
    rows = load_rows(dataset, split, max_samples=max_samples)
    return make_examples(rows, format=format, skip_bad_rows=skip_bad_rows)


def load_rows(dataset: str, split: str = "train", *, max_samples: int | None = None) -> Rows:
    """Read the rows of a dataset.

    Args:
        dataset: name, file or folder; the module's docstring has the rule.
        split: of a folder or hub dataset.
        max_samples: only the first so many rows.

    Raises:
        DataError: no such file, an extension that is not known, a file that cannot be read, no rows, or a hub dataset
            that cannot be had.
    """
    found = _read(dataset, split, max_samples)
    if not found.rows:
        raise DataError(f"{found.name}: no rows; give a dataset with at least one")
    return replace(found, rows=found.rows[:max_samples])


def make_examples(rows: Rows, *, format: str | None = None, skip_bad_rows: bool = False) -> Examples:
    """Find the format of rows and make an example of each.

    Args:
        rows: from :func:`load_rows`.
        format: one of ``FORMATS``; None finds it from the columns.
        skip_bad_rows: leave unusable rows out instead of raising.

    Raises:
        DataError: columns that are not known, or a row that cannot be used (with its place).
    """
    columns = list(dict.fromkeys(column for row in rows.rows for column in row.values))
    try:
        form = detect_format(columns, rows.formats if format is None else (format,))
    except DataError as error:
        raise DataError(f"{rows.name}: {error}") from None
    examples, places, skipped = [], [], []
    for row in rows.rows:
        try:
            examples.append(form.read(row.values))
            places.append(row.where)
        except DataError as error:
            if not skip_bad_rows:
                raise DataError(f"{row.where}: {error}. Mend the row, or leave out such rows (skip_bad_rows)") from None
            skipped.append(f"{row.where}: {error}")
    if not examples:
        raise DataError(f"{rows.name}: none of the {len(rows.rows)} rows can be used; the first: {skipped[0]}")
    ignored = tuple(column for column in columns if column not in form.required + form.optional)
    return Examples(rows.name, form.name, ignored, tuple(examples), tuple(places), tuple(skipped))


def _read(dataset: str, split: str, max_samples: int | None) -> Rows:
    """All rows, or, of a hub dataset, the first ``max_samples``."""
    if dataset in PRESETS:
        preset = PRESETS[dataset]
        found = _read_hub(preset.hub, preset.subset, split, preset.revision, dataset, max_samples)
        return Rows(dataset, tuple(found), preset.formats)
    head, colon, tail = dataset.partition(":")
    if colon and head in PRESETS:
        return _read_local(dataset, Path(tail).expanduser(), split, PRESETS[head].formats)
    path = Path(dataset).expanduser()
    if path.exists():
        return _read_local(dataset, path, split, FORMATS)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", head) and not head.startswith(".") and _extension(path) is None:
        return Rows(dataset, tuple(_read_hub(head, tail or None, split, None, None, max_samples)), FORMATS)
    if colon and re.fullmatch(r"\w+", head):
        raise DataError(f"unknown preset {head!r} in {dataset!r}; known are {', '.join(PRESETS)}")
    raise DataError(
        f"dataset {dataset!r} is not a file, not a folder, not a preset ({', '.join(PRESETS)}) and not a hub "
        "name (owner/name); check the spelling"
    )


def _read_local(name: str, path: Path, split: str, formats: tuple[str, ...]) -> Rows:
    if not path.exists():
        raise DataError(f"no file or folder {str(path)!r}; check the path")
    files = find_split(path, split) if path.is_dir() else [path]
    return Rows(name, tuple(row for file in files for row in read_file(file)), formats, tuple(files))


def find_split(folder: Path, split: str) -> list[Path]:
    """The files of a folder (or of its subfolder ``data``) that hold a split, in name order.

    A file belongs to a split when its name is that of the split, or goes on with ``-``, ``_`` or ``.`` after
    it (``train.jsonl.gz``, ``train-00000-of-00002.parquet``). Where there is none, ``valid``, ``val``, ``dev``,
    ``eval`` and ``validation`` mean the same. The only data file of a folder is its train split, whatever its name.

    Raises:
        DataError: no file of that split, or files of two kinds; lists the data files there are.
    """
    files = [file for place in (folder, folder / "data") if place.is_dir() for file in sorted(place.iterdir())]
    files = [file for file in files if file.is_file() and _extension(file) is not None]
    aliases = next((names for names in _SPLIT_NAMES.values() if split in names), (split,))
    found: list[Path] = []
    for names in ((split,), aliases):
        pattern = re.compile(rf"({'|'.join(map(re.escape, names))})([-_.].*)?")
        found = found or [file for file in files if pattern.fullmatch(file.name)]
    if not found and len(files) == 1 and split == "train":
        return files
    listing = ", ".join(file.name for file in files) or "none"
    if not found:
        raise DataError(f"folder {str(folder)!r} has no file for split {split!r} (data files: {listing}); give a file")
    if len({_extension(file) for file in found}) > 1:
        raise DataError(f"folder {str(folder)!r} has split {split!r} in more than one kind ({listing}); give a file")
    return found


def _extension(path: Path) -> str | None:
    """``.csv`` for ``a.csv`` and ``a.csv.gz``; None for what cannot be read."""
    name = path.name.lower().removesuffix(".gz")
    return next((extension for extension in EXTENSIONS if name.endswith(extension)), None)


def read_file(path: Path) -> list[Row]:
    """The rows of one file, each with its place; values are as they are in the file (CSV: all strings).

    Raises:
        DataError: unknown extension, damaged compression, or contents that do not parse (with the line).
    """
    extension = _extension(path)
    if extension is None:
        raise DataError(
            f"file {str(path)!r} has an extension that cannot be read; known are {', '.join(EXTENSIONS)}, "
            "each also with .gz"
        )
    with tempfile.TemporaryDirectory(prefix="lotaqaf_data_") as scratch:
        plain = path
        if path.name.lower().endswith(".gz"):
            plain = Path(scratch) / f"data{extension}"
            try:
                with gzip.open(path, "rb") as packed, plain.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"file {str(path)!r} is not a whole gzip file: {error}; fetch it again") from error
        return _READERS[extension](path.name, plain, scratch)


def _read_json(name: str, path: Path, scratch: str) -> list[Row]:
    """A list of objects, or else one object per line."""
    lines = _read_strings(name, path, scratch)
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("["):
        return _read_jsonl(name, path, scratch)
    try:
        items = json.loads("\n".join(lines))
    except json.JSONDecodeError as error:
        raise DataError(f"{name}, line {error.lineno}: invalid JSON, {error.msg} (column {error.colno})") from None
    return [_json_row(f"{name}, row {number}", item) for number, item in enumerate(items, start=1)]


def _read_jsonl(name: str, path: Path, scratch: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_read_strings(name, path, scratch), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            rows.append(_json_row(where, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: invalid JSON, {error.msg} (column {error.colno}); mend or remove it") from None
    return rows


def _json_row(where: str, item: Any) -> Row:
    if not isinstance(item, dict):
        raise DataError(f"{where}: found {type(item).__name__}; expected an object with the row's columns")
    return Row(where, item)


def _read_txt(name: str, path: Path, scratch: str) -> list[Row]:
    lines = enumerate(_read_strings(name, path, scratch), start=1)
    return [Row(f"{name}, line {number}", {"text": line}) for number, line in lines if line.strip()]


def _read_csv(name: str, path: Path, scratch: str) -> list[Row]:
    import pandas
    from datasets import Dataset

    try:
        head = pandas.read_csv(path, nrows=1, encoding="utf-8-sig")
    except ValueError as error:
        raise DataError(f"file {name!r} cannot be read as CSV: {error}") from error
    if head.empty:
        return []
    # Without these two, "007" becomes 7 and "None" or "NA" becomes a missing value.
    options = {"features": _string_features(*head.columns), "keep_default_na": False}
    table = _read_table("CSV", Dataset.from_csv, name, path, scratch, encoding="utf-8-sig", **options)
    return _number_rows(name, table)


def _read_parquet(name: str, path: Path, scratch: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        count = pyarrow.parquet.read_metadata(path).num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"file {name!r} cannot be read as Parquet: {error}") from error
    if not count:
        return []
    return _number_rows(name, _read_table("Parquet", Dataset.from_parquet, name, path, scratch))


_READERS: Mapping[str, Callable[[str, Path, str], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _read_strings(name: str, path: Path, scratch: str) -> list[str]:
    """The lines of a text file, without their ends."""
    from datasets import Dataset

    if not path.stat().st_size:
        return []
    options = {"features": _string_features("text"), "encoding": "utf-8-sig"}
    return list(_read_table("text", Dataset.from_text, name, path, scratch, **options)["text"])


def _string_features(*columns: str) -> Any:
    from datasets import Features, Value

    return Features({column: Value("string") for column in columns})


def _read_table(
    kind: str, read: Callable[..., Dataset], name: str, path: Path, scratch: str, **options: Any
) -> Dataset:
    """One file, which has rows, as a table in memory.

    ``load_dataset`` would do the same, but it also reports its use over the network.
    """
    from datasets.exceptions import DatasetGenerationError

    # A path is a pattern to `datasets`, and may hold brackets.
    pattern = glob.escape(str(path))
    try:
        return read(pattern, cache_dir=scratch, keep_in_memory=True, **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise DataError(f"file {name!r} cannot be read as {kind}: {str(reason).strip()}") from error


def _number_rows(name: str, table: Dataset) -> list[Row]:
    return [Row(f"{name}, row {number}", row) for number, row in enumerate(table, start=1)]


def _read_hub(
    hub: str,
    subset: str | None,
    split: str,
    revision: str | None,
    preset: str | None,
    max_samples: int | None,
) -> list[Row]:
    from datasets import load_dataset

    try:
        table = load_dataset(hub, subset, split=split, revision=revision)
    except Exception as error:  # the network, the hub and the files there fail in too many ways to list
        instead = f"{preset}:PATH" if preset else "PATH"
        raise DataError(
            f"hub dataset {hub!r}, split {split!r}, cannot be had ({type(error).__name__}: "
            f"{str(error).strip()}). Without a network, give local data: {instead}, where PATH is a file "
            f"({', '.join(EXTENSIONS)}, each also .gz) or a folder with a file {split}.*"
        ) from error
    if max_samples is not None:
        table = table.select(range(min(max_samples, len(table))))
    return _number_rows(f"{hub} {split}", table)
