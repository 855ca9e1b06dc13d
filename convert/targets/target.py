"""What an export target is, what it can hold, and what writing to it reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.tensors import quantized_stacks
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.quant.weight import group_length

__all__ = ["EXACT", "ExportReport", "Record", "Source", "Target", "check_fit", "table_row"]

EXACT = 2.0**-15
"""Steps of the grid up to which a target counts as exact: what float32, in which weights are computed, rounds off."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What goes into an exported folder beside the weights.

    Attributes:
        base: the checkpoint that the model was loaded from, if it is known.
        config: config.json of the model.
        folder: where tokenizer, template, generation and licence files are copied from; None for none.
        name: what an adapter's config calls the exported model: where its folder will be.
    """

    base: CheckpointFolder | None
    config: Mapping[str, Any]
    folder: Path | None
    name: str

    @property
    def plain_config(self) -> dict[str, Any]:
        """config.json without what it says of its quantisation."""
        return {key: value for key, value in self.config.items() if key not in ("quantization_config", "quantization")}


Record = Callable[[str, float], None]
"""Told of every quantised module and the largest error of its written weight, in steps; raises to refuse it."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A format to export to; one that does not say otherwise holds every model that loads.

    Attributes:
        name: as --target says it.
        title: what it is, in a few words.
        offset: where mu goes.
        exact: when it is exact, and how far it is off where it is not.
        runtimes: what loads it.
        size: (model, source): bytes that it takes.
        write: (model, source, folder, record, progress): writes the files into an empty folder.
        bits: widths that it holds.
        group_sizes: rows of a group that it holds, -1 standing for one group; None for any.
        act_order: whether groups may be scattered.
        partial: whether the last group may be shorter than the others.
        inputs: of what the inputs of a weight have to be a multiple.
        group_rows: of what the rows of a group have to be a multiple, of all inputs where they are one group.
        outputs: of what the outputs of a weight have to be a multiple.
    """

    name: str
    title: str
    offset: str
    exact: str
    runtimes: tuple[str, ...]
    size: Callable[[Decoder, Source], int]
    write: Callable[[Decoder, Source, Path, Record, bool], None]
    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] | None = None
    act_order: bool = True
    partial: bool = True
    inputs: int = 1
    group_rows: int = 1
    outputs: int = 1

    def misfits(self, bits: int, group_size: int, shape: tuple[int, int], in_order: bool) -> Iterator[str]:
        """Why it has no room for a weight.

        Args:
            bits: width of the integers.
            group_size: rows of a group, -1 for one group.
            shape: (in, out).
            in_order: row i is of group i // group_size.
        """
        n_in, n_out = shape
        if bits not in self.bits:
            yield f"{bits} bit, it holds {_list(self.bits)}"
        if self.group_sizes is not None and group_size not in self.group_sizes:
            yield f"groups of {group_size} rows, it holds {_list(self.group_sizes)}"
        elif group_length(n_in, group_size) % self.group_rows:
            yield f"{n_in} inputs in one group, it holds multiples of {self.group_rows}"
        elif n_in % self.inputs:
            yield f"{n_in} inputs, it holds multiples of {self.inputs}"
        if not in_order and not self.act_order:
            yield "act-order (the rows of a group lie anywhere), it holds groups of consecutive rows"
        if not self.partial and group_size != -1 and n_in % group_size:
            yield f"{n_in} inputs, it holds whole groups of {group_size}"
        if n_out % self.outputs:
            yield f"{n_out} outputs, it holds multiples of {self.outputs}"


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        target: its name.
        errors: the largest error of every quantised module, in steps of its grid.
        integers: how many the model has; 0 where they were not compared with a base's.
        moved: how many of them are not where the base has them.
        largest_move: the largest |move|, in steps.
    """

    target: str
    errors: Mapping[str, float]
    integers: int = 0
    moved: int = 0
    largest_move: int = 0

    @property
    def largest(self) -> tuple[str, float]:
        """The module with the largest error, and that; ("", 0) for a model without quantised modules."""
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))

    @property
    def exact(self) -> bool:
        """Whether every weight is the model's, up to rounding in float32."""
        return self.largest[1] <= EXACT

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        found = {"target": self.target, "exact": self.exact, "largest_error_steps": self.largest[1]}
        if self.integers:
            found |= {"moved_share": self.moved / self.integers, "largest_move": self.largest_move}
        return found | {"errors_steps": dict(self.errors)}

    def __str__(self) -> str:
        name, error = self.largest
        found = f"largest error {error:.4f} steps of the grid, in {name}"
        if self.exact:
            found = f"exact, all {len(self.errors)} quantised modules (error {error:.1e} steps)"
        lines = [f"target       {self.target}: {found}"]
        if self.moved:  # None did where the base is the merged folder itself.
            share = self.moved / self.integers
            lines.append(f"integers     {share:.4%} moved from the base's, none by more than {self.largest_move} step")
        return "\n".join(lines)


def check_fit(target: Target, model: Decoder) -> None:
    """Refuse a model that the target has no room for.

    Raises:
        ConfigError: names the modules that do not fit, and why.
    """
    found: dict[str, list[str]] = {}
    for name, (weight, _) in quantized_stacks(model).items():
        for why in target.misfits(weight.bits, weight.group_size, weight.shape, weight.g_idx is None):
            found.setdefault(why, []).append(name)
    if found:
        lines = [f"{why} ({_first(names)})" for why, names in found.items()]
        raise ConfigError(
            f"--target {target.name}: the model has {'; '.join(lines)}. Use another target; gptq holds every "
            "model that loads."
        )


def table_row(target: Target) -> str:
    """A row of the table of targets, in Markdown: name, title, bits, groups, order, offset, exactness, runtimes."""
    groups = "any" if target.group_sizes is None else _list(target.group_sizes)
    cells = [f"`{target.name}`", target.title, _list(target.bits), groups, "yes" if target.act_order else "no"]
    return f"| {' | '.join([*cells, target.offset, target.exact, ', '.join(target.runtimes)])} |"


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
