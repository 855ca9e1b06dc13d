"""Shards of safetensors: which tensor goes into which file, and the index that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from convert.writing import write_json
from lotaqaf_jax.quant.folder import INDEX

__all__ = ["SHARD_BYTES", "shards_of", "write_index"]

SHARD_BYTES = 5 * 10**9


def shards_of(groups: Iterable[tuple[Sequence[str], int]]) -> dict[str, list[str]]:
    """The tensors of every file by its name, in their order.

    Args:
        groups: (names, bytes) of tensors that go into one file together. A file has at most :data:`SHARD_BYTES`, or
            a single group.

    Source: transformers writes ``model.safetensors``, or ``model-00001-of-00002.safetensors`` and so on with an index.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for names, more in groups:
        if shards[-1] and size + more > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1] += names
        size += more
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total: int) -> None:
    """Write the index of several files, which hold ``total`` bytes; for a single one there is none."""
    if len(shards) > 1:
        where = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
