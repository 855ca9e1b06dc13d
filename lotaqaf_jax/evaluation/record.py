"""Results for people and for files: a table, a JSON file with all that is needed to repeat a run, and JSON lines."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from tqdm import tqdm

from lotaqaf_jax import __version__
from lotaqaf_jax.errors import ConfigError, OutputError
from lotaqaf_jax.evaluation.config import EvalConfig
from lotaqaf_jax.evaluation.intervals import Measure
from lotaqaf_jax.evaluation.tasks import TaskResult

__all__ = ["check_outputs", "hash_files", "make_record", "model_files", "table", "write_record", "write_rows"]

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "datasets", "jax-triton", "triton")

# The files of a checkpoint that can change what a model computes or how text becomes tokens.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "offset_adapter/*")
_THREADS = 8
_BLOCK = 2**22


def model_files(folder: Path) -> list[Path]:
    """The files of a model's or an adapter's folder that decide its numbers: weights, configs, tokenizer."""
    return sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()})


def hash_files(files: Sequence[Path], root: Path | None = None, *, progress: bool = True) -> dict[str, str]:
    """sha256 of files, by name, or by path below ``root``.

    Args:
        files: the files.
        root: a folder that holds them all; None names each by its last part.
        progress: show a progress bar when it takes longer than a second.
    """
    total = sum(file.stat().st_size for file in files)
    threads = min(_THREADS, os.cpu_count() or 1)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="hashing", delay=1.0, disable=not progress) as bar,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):

        def digest(file: Path) -> str:
            found = hashlib.sha256()
            with file.open("rb") as opened:
                while block := opened.read(_BLOCK):
                    found.update(block)
                    bar.update(len(block))
            return found.hexdigest()

        names = [file.name if root is None else file.relative_to(root).as_posix() for file in files]
        return dict(zip(names, pool.map(digest, files), strict=True))


def make_record(
    config: EvalConfig, argv: Sequence[str], model: Path, adapter: Path | None, results: Sequence[TaskResult]
) -> dict[str, Any]:
    """All that was measured and all that it depends on, as JSON values.

    ``model.fingerprint`` is the sha256 of the lines "<sha256> <file>" of the model's and the adapter's files in the
    order of their names; two runs with the same fingerprint, data and settings measured the same thing.

    Args:
        config: the settings.
        argv: the command line, without the program's name.
        model: the model's folder.
        adapter: the adapter's folder, or None.
        results: what was measured.
    """
    files = hash_files(model_files(model), model)
    of_adapter = {} if adapter is None else hash_files(model_files(adapter), adapter)
    lines = [f"{value} {name}" for name, value in files.items()]
    lines += [f"{value} adapter/{name}" for name, value in of_adapter.items()]
    device = jax.devices()[0]
    return {
        "lotaqaf_jax": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["evaluate.py", *argv],
        "settings": dataclasses.asdict(config) | {"dtype": jnp.dtype(config.compute_dtype).name},
        "model": {
            "name": config.model,
            "path": str(model.resolve()),
            "adapter": None if adapter is None else str(adapter.resolve()),
            "fingerprint": f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}",
            "files": files,
            "adapter_files": of_adapter,
        },
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device.device_kind,
            "backend": jax.default_backend(),
            "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        },
        "results": [_result(one) for one in results],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _result(one: TaskResult) -> dict[str, Any]:
    task = one.task
    return {
        "task": task.name,
        "kind": task.kind,
        "data": {
            "name": task.data,
            "split": task.split,
            "rows": task.rows,
            "files": hash_files(task.files, progress=False),
            "rows_sha256": task.digest,
        },
        "measures": {measure.name: _measure(measure) for measure in one.result.measures},
        "counts": dict(one.result.counts),
        "seconds": round(one.seconds, 3),
    }


def _measure(measure: Measure) -> dict[str, Any]:
    low, high = measure.interval or (None, None)
    return {"value": measure.value, "low": low, "high": high, "total": measure.total, "unit": measure.unit}


def table(results: Iterable[TaskResult]) -> str:
    """The measures as aligned lines; shares in percent, intervals of 95 %."""
    lines = [("task", "measure", "value", "95 % interval", "measured on")]
    for one in results:
        for measure in one.result.measures:
            if not measure.detail:
                lines.append((one.task.label, *_cells(measure)))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]:>{widths[3]}}  {line[4]}"
        for line in lines
    )


def _cells(measure: Measure) -> tuple[str, str, str, str]:
    scale, digits, unit = (100, 1, " %") if measure.is_share else (1, 4, "")
    value = f"{scale * measure.value:.{digits}f}{unit}"
    ends = measure.interval
    between = "" if ends is None else f"{scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f}"
    return measure.name, value, between, f"{measure.total:,} {measure.unit}"


def check_outputs(config: EvalConfig) -> None:
    """Refuse, before anything is computed, to write over files or into what is no folder.

    Raises:
        ConfigError: a file that is there, one file for both, or a folder that is not there.
    """
    given = {name: Path(value) for name in ("output", "write_out") if (value := getattr(config, name)) is not None}
    for name, path in given.items():
        if path.exists() and (path.is_dir() or not config.overwrite):
            kind = "a folder" if path.is_dir() else "a file that is there already"
            raise ConfigError(f"--{name} {path}: is {kind}. Name another file, or pass --overwrite to replace a file.")
        if not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder {path.parent}. Make it, or name another file.")
    if len(given) == 2 and len({path.resolve() for path in given.values()}) == 1:
        raise ConfigError(f"--write_out {given['write_out']}: is --output too. Name two files.")


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON; the file appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with _whole_file(Path(path)) as file:
        json.dump(record, file, indent=2, ensure_ascii=False)
        file.write("\n")


def write_rows(path: str | Path, results: Iterable[TaskResult]) -> None:
    """Write what came of every row as JSON lines, each with its task; the file appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with _whole_file(Path(path)) as file:
        for one in results:
            for row in one.result.records():
                file.write(json.dumps({"task": one.task.name, **row}, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """A file beside ``path``, which takes its place when the block ends well."""
    partial: str | None = None
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        Path(partial).chmod(0o666 & ~_umask())
        os.replace(partial, path)
        partial = None
    except OSError as problem:
        raise OutputError(f"{path}: could not be written: {problem.strerror or problem}. Check the path.") from problem
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
