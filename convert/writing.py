"""Writing folders and files so that nothing is ever half written: write beside, then rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lotaqaf_jax.errors import ConfigError, OutputError
from lotaqaf_jax.parallel.processes import agree, barrier, is_main

__all__ = ["SAFETENSORS_TYPES", "TensorFile", "clear_leftovers", "new_folder", "write_json", "write_safetensors"]

# What a folder that this package writes always holds one of. Only such a folder is ever replaced.
_OURS = ("config.json", "adapter_config.json", "manifest.json")
_SPARE = 16 * 2**20  # bytes left free beyond what is going to be written
_PARTIAL, _OLD = ".partial-", ".old-"

SAFETENSORS_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint32": "U32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@contextlib.contextmanager
def new_folder(
    directory: str | Path, *, overwrite: bool = False, needed: int = 0, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """Fill a folder that appears at ``directory`` whole, or not at all.

    Gives an empty folder beside ``directory``. When the block ends well its files are flushed to the disk and it is
    renamed; when it raises, Ctrl-C included, it is removed and whatever was at ``directory`` is as it was. A process
    that is killed leaves a hidden folder behind, which the next one for the same ``directory`` removes.

    Args:
        directory: where the folder is to appear; parents are made.
        overwrite: replace a folder that is not empty, if it is one that this package writes.
        needed: bytes that are going to be written; checked against the free space before anything is.
        sources: folders that are read meanwhile, which ``directory`` must neither be, hold nor lie in.

    Yields:
        The folder to write into.

    Raises:
        ConfigError: ``directory`` is not empty, is a file, or overlaps a source.
        OutputError: no space, no permission, or any other error of the file system.
    """
    if jax.process_count() > 1:
        with _shared_folder(directory, overwrite=overwrite, needed=needed, sources=sources) as folder:
            yield folder
        return
    with _own_folder(directory, overwrite=overwrite, needed=needed, sources=sources) as folder:
        yield folder


@contextlib.contextmanager
def _shared_folder(directory: str | Path, **options: Any) -> Iterator[Path]:
    """The same for several processes: the main one makes and places it, and all of them know where it is."""
    if is_main():
        with _own_folder(directory, **options) as folder:
            agree(str(folder))
            yield folder
            barrier(f"{directory} is written")
        barrier(f"{directory} is in its place")
        return
    yield Path(agree(""))
    barrier(f"{directory} is written")
    barrier(f"{directory} is in its place")


@contextlib.contextmanager
def _own_folder(directory: str | Path, *, overwrite: bool, needed: int, sources: Sequence[Path]) -> Iterator[Path]:
    given = str(directory)
    target = Path(directory).expanduser().resolve()
    clear_leftovers(target)
    _check_target(given, target, overwrite, sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if needed and free < needed + _SPARE:
            raise OutputError(
                f"{given}: {(needed + _SPARE) / 1e9:.3g} GB are needed there, {free / 1e9:.3g} GB are free. Nothing "
                "was written; free some space or choose another folder."
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=target.parent))
    except OSError as problem:
        raise _explained(problem, given) from problem
    lock = _lock(partial)
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _flush(partial)
        _put(partial, target)
    except OSError as problem:
        raise _explained(problem, given) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clear_leftovers(directory: str | Path) -> None:
    """Remove what killed processes left beside ``directory``; what they had begun to replace is put back in its place.

    The folders of processes that are still at work stay: each holds a lock on its own, which the system takes from a
    process that ends in whatever way.

    Args:
        directory: as :func:`new_folder` was given it.
    """
    target = Path(directory).expanduser().resolve()

    def left(kind: str) -> list[Path]:
        return sorted(target.parent.glob(glob.escape(f".{target.name}{kind}") + "*"))

    for partial in left(_PARTIAL):
        lock = _lock(partial)
        if lock is None:
            continue
        try:
            if _aside(partial).exists() and not target.exists():
                _aside(partial).rename(target)
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)
    partials = left(_PARTIAL)
    for old in left(_OLD):
        if old not in map(_aside, partials):  # Its successor is in its place, and only its own removal was cut off.
            shutil.rmtree(old, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """An open file that holds the lock of ``folder``, or None where it is not to be had: held, or not supported."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _aside(partial: Path) -> Path:
    """Where the old folder is while ``partial`` takes its place."""
    return partial.with_name(partial.name.replace(_PARTIAL, _OLD))


def _check_target(given: str, target: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    for source in (path.resolve() for path in sources):
        if target == source or target in source.parents or source in target.parents:
            raise ConfigError(
                f"{given}: the output folder is, holds or lies in {source}, which is read. Choose another folder."
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{given}: found a file, expected a folder to write. Choose another name.")
    held = sorted(path.name for path in target.iterdir())
    if not held:
        return
    if not overwrite:
        raise ConfigError(
            f"{given}: the output folder is not empty ({len(held)} entries, the first {held[0]}). Choose a new folder, "
            "or pass --overwrite (overwrite=True) to replace it."
        )
    if not any(name in held for name in _OURS):
        raise ConfigError(
            f"{given}: will not be replaced, since it holds none of {', '.join(_OURS)} and so was not written by this "
            "program. Remove it yourself, or choose another folder."
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explained(problem: OSError, given: str) -> OSError:
    """The sentence for an error of the file system; an error that is already one stays as it is."""
    if isinstance(problem, OutputError):
        return problem
    reason, advice = problem.strerror or str(problem), "check the path and its permissions"
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        reason, advice = "the disk is full", "free some space or choose another folder"
    elif problem.errno == errno.EBUSY:
        reason, advice = "it is a mount point, which cannot be replaced", "choose a folder inside it"
    return OutputError(f"{given}: could not be written: {reason}. Nothing was left there; {advice}, then run again.")


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put(partial: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
        return
    # The old folder is out of the way only for the moment between two renames, and whole at any time.
    old = _aside(partial)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any], indent: int | str = 2) -> None:
    """Write a JSON file as Hugging Face does: UTF-8, indented, ending in a newline."""
    if is_main():
        path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def file_order(tensors: Mapping[str, tuple[Any, tuple[int, ...]]]) -> tuple[str, ...]:
    """The order of the names in a file: the widest types first, so that each array is aligned."""
    return tuple(sorted(tensors, key=lambda name: (-np.dtype(tensors[name][0]).itemsize, name)))


class TensorFile:
    """A safetensors file that is filled one tensor at a time, in any order, so that the host need not hold several.

    A context manager; leaving it without an error checks that every tensor was written.

    Source: the safetensors format: 8 bytes of header length, a JSON header, the data. The library's own writer holds
    all tensors of a file at once, and from numpy it does not take bfloat16.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Make the file at its full size, with its header.

        Args:
            path: the file.
            tensors: type and shape by name. As in the files of the safetensors library, those with wide types come
                first, so that every tensor is aligned.
            metadata: strings for the header.
        """
        self.names = file_order(tensors)
        self._tensors = {name: (np.dtype(tensors[name][0]), tensors[name][1]) for name in self.names}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        starts, end = {}, 0
        for name, (dtype, shape) in self._tensors.items():
            starts[name], end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            offsets = [starts[name], end]
            header[name] = {"dtype": SAFETENSORS_TYPES[dtype.name], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._starts = {name: 8 + len(text) + start for name, start in starts.items()}
        self._missing = set(self.names)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + end)

    def write(self, name: str, array: np.ndarray) -> None:
        """Put a tensor in its place.

        Raises:
            ValueError: the array is not what the header says.
        """
        dtype, shape = self._tensors[name]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name}: found {array.dtype} {array.shape}, expected {dtype} {shape}")
        self._file.seek(self._starts[name])
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, the first {min(self._missing)}")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file one tensor at a time, in the order of the file.

    Args:
        path: the file.
        tensors: type and shape by name.
        read: gives the array of a name.
        metadata: strings for the header.

    Raises:
        ValueError: an array is not what ``tensors`` says.
    """
    if not is_main():  # The arrays may lie on the devices of all processes, which then have to read them together.
        for name in file_order(tensors):
            read(name)
        return
    with TensorFile(path, tensors, metadata) as file:
        for name in file.names:
            file.write(name, read(name))
