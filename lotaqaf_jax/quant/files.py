"""Files of a checkpoint folder: JSON, and the tensors of safetensors shards, memory-mapped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lotaqaf_jax.errors import CheckpointError

__all__ = ["TensorEntry", "map_tensor", "read_header", "read_json"]

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U32": np.uint32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its shard, type, shape and the byte range in the file."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Pass a folder that holds a checkpoint.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise CheckpointError(f"{path}: not valid JSON ({problem}). Download the file again.") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: found a JSON {type(parsed).__name__}, expected an object.")
    return parsed


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the header of a safetensors file and check it against the file's size.

    The safetensors library checks the file first (valid header, no holes, no overlap, nothing cut off); this adds the
    byte ranges, which the library does not give, and names the tensor when a shape does not fit its bytes.

    Args:
        path: a ``.safetensors`` file.

    Returns:
        Every tensor by name, in the order of the file.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt, or holds a type that is not known here.

    Source: the safetensors format: 8 bytes of header length, a JSON header, the data.
    """
    import safetensors

    if not path.is_file():
        raise CheckpointError(f"{path}: the shard is missing. Download the checkpoint again.")
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as problem:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({problem}). It is truncated or corrupt; download it again."
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    entries = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        if item["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has type {item['dtype']}, expected one of {sorted(_DTYPES)}.")
        dtype = np.dtype(_DTYPES[item["dtype"]])
        shape = tuple(item["shape"])
        start, stop = (8 + length + offset for offset in item["data_offsets"])
        expected = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if stop - start != expected:
            raise CheckpointError(
                f"{path}: tensor {name} has {stop - start} bytes, but its shape {shape} of {dtype} needs {expected}."
            )
        entries[name] = TensorEntry(path, dtype, shape, start, stop)
    return entries


def map_tensor(entry: TensorEntry) -> np.ndarray:
    """The tensor as a read-only array over the memory-mapped file; nothing is copied."""
    if entry.nbytes == 0:
        return np.zeros(entry.shape, entry.dtype)
    raw = np.memmap(entry.file, dtype=np.uint8, mode="r", offset=entry.start, shape=(entry.nbytes,))
    return raw.view(entry.dtype).reshape(entry.shape)
