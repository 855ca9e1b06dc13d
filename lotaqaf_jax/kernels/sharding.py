"""How a matrix (in, out) lies on a mesh of devices, and what that makes of every array of its weight and its adapters.

The mesh has three axes. The rows of a batch are cut over DATA and FSDP. FSDP also cuts what is stored, and a layer's
arrays are gathered over it while the layer is computed: packed words, a sixth of what 16-bit weights would be. TENSOR
cuts the computation itself: the columns of a matrix, or its rows, whose partial products are then summed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lotaqaf_jax.kernels.adapter import AnyAdapter, GroupLowRank, TernaryAdapter
from lotaqaf_jax.quant.weight import QuantizedWeight

__all__ = [
    "AXES",
    "BATCH",
    "DATA",
    "FSDP",
    "TENSOR",
    "MatrixSharding",
    "adapter_specs",
    "axes_names",
    "batch_axes",
    "batch_shards",
    "named",
    "shardings",
    "spec",
    "weight_specs",
]

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
BATCH = (DATA, FSDP)
"""The axes that cut the rows of a batch."""

Axes = tuple[str, ...]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class MatrixSharding:
    """Where the arrays of a matrix W (in, out) and of its adapters A (in, rank) and B (rank, out) lie.

    Attributes:
        mesh: with the axes :data:`AXES`.
        rows: whether TENSOR cuts ``in``: of W, its scales by whole groups, and A.
        columns: whether TENSOR cuts ``out``: of W, its scales, the bias, and B.
        stored_columns: whether FSDP cuts ``out`` of what is stored, after TENSOR.
        stored_rows: whether FSDP cuts ``in`` of A, after TENSOR.
    """

    mesh: Mesh
    rows: bool = False
    columns: bool = False
    stored_columns: bool = False
    stored_rows: bool = False

    @property
    def row_parts(self) -> int:
        """Into how many parts ``in`` of W is cut."""
        return self.mesh.shape[TENSOR] if self.rows else 1

    @property
    def row_axes(self) -> Axes:
        """The axes that cut ``in`` of W."""
        return (TENSOR,) if self.rows else ()

    @property
    def adapter_row_axes(self) -> Axes:
        """The axes that cut ``in`` of A."""
        return self.row_axes + ((FSDP,) if self.stored_rows else ())

    @property
    def column_axes(self) -> Axes:
        """The axes that cut ``out`` of what is stored."""
        return ((TENSOR,) if self.columns else ()) + ((FSDP,) if self.stored_columns else ())

    @property
    def product_axes(self) -> Axes:
        """The axes that cut ``out`` of y = x @ W."""
        return (TENSOR,) if self.columns else ()

    def named(self, *entries: Axes | None) -> NamedSharding:
        """A sharding of an array by the axes of each of its dimensions."""
        return named(self.mesh, *entries)


def axes_names(*entries: Axes | None) -> tuple[Any, ...]:
    """The axes that cut each dimension as JAX and Flax write them: None, a name, or several."""
    return tuple(None if not axes else axes[0] if len(axes) == 1 else axes for axes in entries)


def spec(*entries: Axes | None) -> P:
    """A PartitionSpec from the axes that cut each dimension."""
    return P(*axes_names(*entries))


def named(mesh: Mesh, *entries: Axes | None) -> NamedSharding:
    """A sharding from the axes that cut each dimension."""
    return NamedSharding(mesh, spec(*entries))


def batch_axes(mesh: Mesh, rows: int) -> Axes:
    """:data:`BATCH` if they cut ``rows`` evenly, else none: every device then computes all rows."""
    return BATCH if rows % batch_shards(mesh) == 0 else ()


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def weight_specs(w: QuantizedWeight, sharding: MatrixSharding, stacked: int = 0) -> QuantizedWeight:
    """The arrays' specs in place of the arrays, ``stacked`` leading axes uncut."""
    stack: tuple[None, ...] = (None,) * stacked
    # Rows are cut where groups begin, see parallel.rules.
    per_group = spec(*stack, sharding.row_axes, sharding.column_axes)
    specs: Any = {"qweight": per_group, "scales": per_group, "zeros": per_group}
    specs["g_idx"] = None if w.g_idx is None else spec(*stack, None)
    specs["offset"] = None if w.offset is None else per_group
    return dataclasses.replace(w, **specs)


def adapter_specs(adapter: AnyAdapter, sharding: MatrixSharding, stacked: int = 0) -> AnyAdapter:
    """The same for adapters."""
    stack: tuple[None, ...] = (None,) * stacked
    # QA-LoRA's A has a row for every group, which are few.
    rows = sharding.row_axes if isinstance(adapter, GroupLowRank) else sharding.adapter_row_axes
    specs: Any = {"a": spec(*stack, rows, None), "b": spec(*stack, None, sharding.column_axes)}
    if isinstance(adapter, TernaryAdapter) and adapter.omega is not None:
        specs["omega"] = spec(*stack)
    return dataclasses.replace(adapter, **specs)


def shardings(specs: Tree, mesh: Mesh) -> Tree:
    """NamedShardings in place of specs."""
    return jax.tree.map(lambda one: NamedSharding(mesh, one), specs, is_leaf=lambda one: isinstance(one, P))
