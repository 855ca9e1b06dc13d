"""Tile sizes of the transposing kernel, apart from it; benchmarks/tune.py measures others."""

from __future__ import annotations

import dataclasses

__all__ = ["TRANSPOSE", "TransposeBlocks"]


@dataclasses.dataclass(frozen=True)
class TransposeBlocks:
    """A tile of ``rows`` by ``columns``, run by ``warps`` warps."""

    rows: int
    columns: int
    warps: int


TRANSPOSE = TransposeBlocks(64, 64, 4)
"""For every shape and type."""
