"""Sizes of the packed matmul's programs, apart from the kernel: measured on one H200, a rule for every shape."""

from __future__ import annotations

import dataclasses

__all__ = ["BUCKETS", "MatmulBlocks", "bucket_of", "matmul_blocks", "period_of"]

BUCKETS = (8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class MatmulBlocks:
    """One program: ``rows`` by 32 * ``tiles`` columns, ``warps`` that share k, ``steps`` of four periods at a time.

    ``ahead``: whether x is loaded a round ahead, as the words are; ``split``: programs that share k between them.
    """

    rows: int
    tiles: int
    warps: int
    steps: int
    abreast: int = 1
    stages: int = 4
    x_ahead: bool = True
    split: int = 1


def period_of(bits: int) -> tuple[int, int]:
    """(values, words) of what a lane holds of one column: whole words, values in pairs that lie 16 bits apart."""
    return {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (8, 2)}[bits]


def bucket_of(rows: int) -> int | None:
    """The smallest bucket that holds this many rows, or None."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), None)


def matmul_blocks(rows: int, n_in: int, n_out: int, bits: int, group: int) -> MatmulBlocks | None:
    """The blocks for x (rows, n_in) and W (n_in, n_out) with ``group`` rows in a group; None where no blocks do.

    A round of a warp must lie in one group, or a step must hold whole groups of whole periods.
    """
    bucket = bucket_of(rows)
    values, _ = period_of(bits)
    depth = 4 * values
    whole = group >= n_in or group % depth == 0
    if bucket is None or not (whole or (depth % group == 0 and group % values == 0)):
        return None
    steps = 1
    while bucket <= 16 and steps * values < 16 and whole and (group >= n_in or group % (2 * steps * depth) == 0):
        steps *= 2
    warps = 8
    return MatmulBlocks(min(bucket, 64), 1, warps, steps, x_ahead=bucket <= 16)
