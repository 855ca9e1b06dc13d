"""What a folder of another format shows: GPTQ's tensors, made from what is stored when they are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.quant.config import ModuleQuantization, QuantizationConfig
from lotaqaf_jax.quant.files import TensorEntry, map_tensor

__all__ = ["FLOATS", "Converted", "Stored", "View", "Words", "described"]

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
"""The types of scales."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """A tensor that no file holds as it is: its type and shape, and ``read()``, which makes it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Words:
    """Where the packed integers of a module are stored, and how GPTQ's words become those.

    Attributes:
        name: of the stored tensor.
        stored: GPTQ's ``qweight`` to an array of the type and shape of the stored tensor.
    """

    name: str
    stored: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class View:
    """A folder as if it were a GPTQ one of ``checkpoint_format`` gptq_v2.

    Attributes:
        format: "awq", "compressed-tensors" or "mlx".
        quantization: what a GPTQ config would say.
        tensors: every tensor by name; those that are no part of a quantised module as they are stored.
        words: by module.
        notes: sentences on what was converted so far.
    """

    format: str
    quantization: QuantizationConfig
    tensors: Mapping[str, TensorEntry | Converted]
    words: Mapping[str, Words]
    notes: Callable[[], tuple[str, ...]] = tuple


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors of a folder as its files hold them."""

    entries: Mapping[str, TensorEntry]

    def read(self, name: str) -> np.ndarray:
        """The tensor over the memory-mapped file."""
        return map_tensor(self.entries[name])

    def modules(self, part: str) -> list[str]:
        """The modules that have the tensor ``part``, in the order of the files."""
        return [name.removesuffix(f".{part}") for name in self.entries if name.endswith(f".{part}")]

    def matrix(self, name: str, kinds: Iterable[Any]) -> TensorEntry:
        """The entry of a matrix.

        Raises:
            CheckpointError: it is missing, is no matrix, or has a type that is not among ``kinds``.
        """
        entry, wanted = self.entries.get(name), [np.dtype(kind) for kind in kinds]
        if entry is None:
            raise CheckpointError(f"{name}: missing beside the other tensors of its module. Download the model again.")
        if len(entry.shape) != 2 or entry.dtype not in wanted:
            names = " or ".join(kind.name for kind in wanted)
            raise CheckpointError(
                f"{name}: found {entry.dtype} {entry.shape}, expected a matrix of {names}. It is not laid out as "
                "this format is written today; save the model again with a current version of its writer."
            )
        return entry

    def others(self, used: Iterable[str]) -> dict[str, TensorEntry | Converted]:
        """All tensors but ``used``."""
        left = set(used)
        return {name: entry for name, entry in self.entries.items() if name not in left}


def described(default: ModuleQuantization, modules: Mapping[str, ModuleQuantization]) -> QuantizationConfig:
    """The GPTQ config of ``modules``: ``default``, with overrides of those that differ. A pattern for each kind of
    module, not for each module, since every module is looked up in all patterns."""
    kinds: dict[ModuleQuantization, list[str]] = {}
    for name, how in modules.items():
        if how != default:
            kinds.setdefault(how, []).append(name)
    dynamic = tuple(
        (f"(?:{'|'.join(map(re.escape, names))})$", tuple(dataclasses.asdict(how).items()))
        for how, names in kinds.items()
    )
    return QuantizationConfig(default, "gptq_v2", "lm_head" in modules, dynamic)
