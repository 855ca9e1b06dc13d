"""A checkpoint folder on disk: its configs, its safetensors shards, and its tensors under GPTQ's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.quant.config import QuantizationConfig
from lotaqaf_jax.quant.files import TensorEntry, map_tensor, read_header, read_json
from lotaqaf_jax.quant.formats import Converted, View, method_of, view_of

__all__ = ["INDEX", "PARTS", "CheckpointFolder", "TensorEntry", "read_header", "read_json"]

INDEX = "model.safetensors.index.json"

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""The tensors of a quantised module, by the ends of their names."""


class CheckpointFolder:
    """A Hugging Face checkpoint folder, opened for reading.

    Quantised modules are shown as GPTQ's ``qweight``, ``qzeros``, ``scales`` and ``g_idx``. In a folder of another
    format (:mod:`lotaqaf_jax.quant.formats`) they are made from what is stored when they are read, one at a time.

    Attributes:
        path: the folder.
        config: the parsed config.json.
        quantization: the GPTQ config, or None for a 16-bit checkpoint; from config.json, completed by
            quantize_config.json where that exists. Of another format, what says the same.
        stored: every tensor of every shard by name, as it lies in the files.
        tensors: every tensor by name, quantised modules as GPTQ's; the same as ``stored`` in a GPTQ folder.
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
        said, where = self._said()
        method = method_of(self.config, said, where)
        self.quantization: QuantizationConfig | None = None
        if method == "gptq" and said is not None:
            self.quantization = QuantizationConfig.from_hf(said, where)
        self.stored: Mapping[str, TensorEntry] = self._read_headers()
        self.tensors: Mapping[str, TensorEntry | Converted] = self.stored
        self._view: View | None = None
        if method != "gptq":
            self._view = view_of(method, self.config, said, self.stored, where)
            self.quantization, self.tensors = self._view.quantization, self._view.tensors

    def _said(self) -> tuple[Any, str]:
        """The quantisation config, None without one, and what to call it in errors."""
        embedded = self.config.get("quantization_config")
        beside = self.path / "quantize_config.json"
        if not beside.is_file():
            return embedded, f"{self.path / 'config.json'}: quantization_config"
        if not isinstance(embedded, dict):
            return read_json(beside), str(beside)
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
        return {**other, **said}, f"{self.path / 'config.json'}: quantization_config"

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
    def format(self) -> str:
        """How quantised modules are stored: "gptq" (16-bit checkpoints too), "awq", "compressed-tensors" or "mlx"."""
        return "gptq" if self._view is None else self._view.format

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the tensors that were converted so far, a sentence each."""
        return () if self._view is None else self._view.notes()

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        """The names of the modules whose weights are packed integers."""
        return tuple(name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight"))

    @property
    def shards(self) -> tuple[Path, ...]:
        """The shard files, in the order of the index."""
        return tuple(dict.fromkeys(entry.file for entry in self.stored.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(entry.nbytes for entry in self.stored.values())

    def read(self, name: str) -> np.ndarray:
        """The tensor ``name`` of ``tensors``: a read-only array over the memory-mapped file, or converted.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be shown as GPTQ's.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing from the checkpoint.")
        return entry.read() if isinstance(entry, Converted) else map_tensor(entry)

    def read_stored(self, name: str) -> np.ndarray:
        """The tensor ``name`` of ``stored``, as a read-only array over the memory-mapped file; nothing is copied.

        Raises:
            CheckpointError: there is no such tensor.
        """
        entry = self.stored.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing from the checkpoint.")
        return map_tensor(entry)

    def words_name(self, module: str) -> str:
        """The name in ``stored`` of the tensor that holds the packed integers of ``module``."""
        return f"{module}.qweight" if self._view is None else self._view.words[module].name

    def to_stored(self, module: str, qweight: np.ndarray) -> np.ndarray:
        """The words of GPTQ's ``qweight`` (ceil(in*bits/32), out) in the order in which ``module`` is stored here."""
        return qweight if self._view is None else self._view.words[module].stored(qweight)
