"""A checkpoint folder on disk: its configs, its safetensors shards, and its tensors, memory-mapped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.quant.config import QuantizationConfig

__all__ = ["INDEX", "CheckpointFolder", "TensorEntry", "read_header", "read_json"]

INDEX = "model.safetensors.index.json"
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


class CheckpointFolder:
    """A Hugging Face checkpoint folder, opened for reading.

    Attributes:
        path: the folder.
        config: the parsed config.json.
        quantization: the GPTQ config, or None for a 16-bit checkpoint; from config.json, completed by
            quantize_config.json where that exists.
        tensors: every tensor of every shard by name.
    """

    def __init__(self, path: str | Path) -> None:
        """Open ``path``: read configs and headers, and check that no shard is missing or damaged.

        Raises:
            CheckpointError: not a folder, no config or weights, a shard missing or damaged.
            ConfigError: a quantisation config that cannot be read, or two that contradict each other.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            problem = "not a folder" if self.path.exists() else "no such folder"
            raise CheckpointError(f"{self.path}: {problem}. Pass the folder of a GPTQ checkpoint.")
        self.config = read_json(self.path / "config.json")
        self.quantization = self._read_quantization()
        self.tensors: Mapping[str, TensorEntry] = self._read_headers()

    def _read_quantization(self) -> QuantizationConfig | None:
        embedded = self.config.get("quantization_config")
        beside = self.path / "quantize_config.json"
        if not beside.is_file():
            where = f"{self.path / 'config.json'}: quantization_config"
            return None if embedded is None else QuantizationConfig.from_hf(embedded, where)
        if not isinstance(embedded, dict):
            return QuantizationConfig.from_hf(read_json(beside), str(beside))
        # Some software reads one file and some the other, so they may complete, but not contradict, each other.
        other = read_json(beside)
        for key in ("bits", "group_size", "checkpoint_format"):
            pair = embedded.get(key), other.get(key)
            if None not in pair and pair[0] != pair[1]:
                raise ConfigError(
                    f"{self.path}: {key} is {pair[0]} in config.json but {pair[1]} in quantize_config.json. Remove the "
                    "file that does not belong to these weights, or correct it."
                )
        said = {key: value for key, value in embedded.items() if value is not None}
        return QuantizationConfig.from_hf({**other, **said}, f"{self.path / 'config.json'}: quantization_config")

    def _read_headers(self) -> dict[str, TensorEntry]:
        index = self.path / INDEX
        if not index.is_file():
            return read_header(self._single_file())
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise CheckpointError(f"{index}: 'weight_map' is missing, empty or damaged. Download the index again.")
        tensors: dict[str, TensorEntry] = {}
        for shard in dict.fromkeys(weight_map.values()):
            tensors.update(read_header(self.path / shard))
        lost = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].file.name != shard]
        if lost:
            raise CheckpointError(
                f"{index}: {len(lost)} tensors are not in the shard it names, the first {lost[0]} in "
                f"{weight_map[lost[0]]}. Download the checkpoint again."
            )
        return tensors

    def _single_file(self) -> Path:
        usual = self.path / "model.safetensors"
        if usual.is_file():
            return usual
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{self.path}: {len(found)} safetensors files but no {INDEX}, so some may be missing. "
                "Download the index as well."
            )
        torch_files = sorted(path.name for path in self.path.glob("*.bin"))
        hint = f" It holds {torch_files[0]}: convert it to safetensors first." if torch_files else ""
        raise CheckpointError(f"{self.path}: no model.safetensors and no {INDEX}.{hint}")

    @property
    def shards(self) -> tuple[Path, ...]:
        """The shard files, in the order of the index."""
        return tuple(dict.fromkeys(entry.file for entry in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """The tensor ``name`` as a read-only array over the memory-mapped file; nothing is copied.

        Raises:
            CheckpointError: there is no such tensor.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing from the checkpoint.")
        if entry.nbytes == 0:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(entry.file, dtype=np.uint8, mode="r", offset=entry.start, shape=(entry.nbytes,))
        return raw.view(entry.dtype).reshape(entry.shape)
