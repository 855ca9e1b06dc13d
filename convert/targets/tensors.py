"""Targets that are folders of safetensors: a quantised weight becomes some tensors, everything else stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.hf import copy_companions
from convert.shards import shards_of, write_index
from convert.targets.host import HostWeight, host_weight, largest_error
from convert.targets.target import Record, Source
from convert.tensors import dense_tensors, quantized_stacks, take
from convert.writing import TensorFile, write_json
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.parallel.processes import is_main
from lotaqaf_jax.quant import QuantizedWeight

__all__ = ["Form", "form_size", "write_folder"]

_BLOCK = 1024
"""Outputs converted at a time: the comparison is in float64, eight times as large as a 16-bit weight's block."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a quantised weight is stored.

    Attributes:
        shapes: type and shape of every tensor of a weight, by the end of its name.
        convert: those tensors of some outputs of a weight.
        decode: (in, out) float64, what a reader of the target makes of them.
        axis: the axis of the outputs, in each of them; None for a tensor that all outputs share.
    """

    shapes: Callable[[QuantizedWeight], Mapping[str, tuple[Any, tuple[int, ...]]]]
    convert: Callable[[HostWeight], Mapping[str, np.ndarray]]
    decode: Callable[[Mapping[str, np.ndarray], HostWeight], np.ndarray]
    axis: Mapping[str, int | None]


def form_size(model: Decoder, form: Form) -> int:
    """Bytes of all tensors."""
    return sum(_bytes(found) for found in _shapes(model, form).values())


def write_folder(
    model: Decoder,
    source: Source,
    folder: Path,
    record: Record,
    progress: bool,
    *,
    form: Form,
    settings: Mapping[str, Any],
    kind: str = "pt",
) -> None:
    """Write config, tokenizer and shards of a target.

    Args:
        model: the merged decoder.
        source: config and companions.
        folder: an empty folder.
        record: told of the error of every quantised module, as it is written.
        progress: show a progress bar when it takes longer than a second.
        form: how quantised weights are stored.
        settings: keys of config.json that say so, and others that the target wants.
        kind: what the files' metadata says of who wrote them; transformers refuses files that do not say.
    """
    packed, dense, shapes = quantized_stacks(model), dense_tensors(model), _shapes(model, form)
    if is_main():
        if source.folder is not None:
            copy_companions(source.folder, folder, skip=("config.json", "quantize_config.json"))
        write_json(folder / "config.json", {**source.plain_config, **settings})
    together = [[name] for name in dense]
    together += [[f"{name}.{end}" for end in form.shapes(weight)] for name, (weight, _) in packed.items()]
    shards = shards_of((names, sum(_bytes(shapes[name]) for name in names)) for names in together)
    total = sum(_bytes(found) for found in shapes.values())
    first = next(iter(form.axis))  # the tensors of a weight are in one file: where this one is, so are all
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=1.0, disable=not progress) as bar:
        for file, names in shards.items():
            with _Shard(folder / file, {name: shapes[name] for name in names}, kind) as shard:

                def write(name: str, array: np.ndarray, shard: _Shard = shard) -> None:
                    shard.write(name, array)
                    bar.update(array.nbytes)

                for name in names:
                    module, _, end = name.rpartition(".")
                    if name in dense:
                        write(name, dense[name].read())
                    elif end == first:
                        weight, i = packed[module]
                        arrays, error = _converted(host_weight(take(weight, i)), form)
                        record(module, error)
                        for part, array in arrays.items():
                            write(f"{module}.{part}", array)
    write_index(folder, shards, total)


def _converted(weight: HostWeight, form: Form) -> tuple[dict[str, np.ndarray], float]:
    """All tensors of a weight, and their largest error."""
    parts, error = [], 0.0
    for start in range(0, weight.integers.shape[1], _BLOCK):
        block = weight.columns(start, start + _BLOCK)
        arrays = form.convert(block)
        error = max(error, largest_error(form.decode(arrays, block), block))
        parts.append(arrays)
    joined = {}
    for end, axis in form.axis.items():
        joined[end] = parts[0][end] if axis is None else np.concatenate([part[end] for part in parts], axis)
    return joined, error


class _Shard:
    """A file that only the first process writes."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[Any, tuple[int, ...]]], kind: str) -> None:
        self._file = TensorFile(path, shapes, {"format": kind}) if is_main() else None

    def write(self, name: str, array: np.ndarray) -> None:
        if self._file is not None:
            self._file.write(name, array)

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *problem: Any) -> None:
        if self._file is not None:
            self._file.__exit__(*problem)


def _shapes(model: Decoder, form: Form) -> dict[str, tuple[Any, tuple[int, ...]]]:
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {t.name: (t.dtype, t.shape) for t in dense_tensors(model).values()}
    for name, (weight, _) in quantized_stacks(model).items():
        shapes |= {f"{name}.{end}": found for end, found in form.shapes(weight).items()}
    return shapes


def _bytes(found: tuple[Any, tuple[int, ...]]) -> int:
    return np.dtype(found[0]).itemsize * int(np.prod(found[1], dtype=np.int64))
