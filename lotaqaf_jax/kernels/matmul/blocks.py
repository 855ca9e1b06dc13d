"""Sizes of the packed matmul's programs, apart from the kernel: a table by rows and width, a rule for the shape.

Measured on one H200, at 4 bit for all shapes, at 2, 3 and 8 bit for 5120 x 13824 and few rows. What a round of a warp
waits for is latency, not bandwidth, so the numbers settle how much is in flight: words loaded rounds ahead, against
warps that still fit the registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = ["BUCKETS", "MatmulBlocks", "bucket_of", "matmul_blocks", "period_of"]

BUCKETS = (8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class MatmulBlocks:
    """One program: ``rows`` by 32 * ``tiles`` columns, ``warps`` that share k, ``steps`` of four periods in a round.

    Words are loaded ``ahead`` (1 or 2) rounds before their use, x ``x_ahead`` (0 to 2); ``unroll`` rounds are written
    out; with ``rotate`` programs start in different rounds; ``split`` programs share k between them, and their parts
    are added by XLA.
    """

    rows: int
    steps: int
    ahead: int = 1
    x_ahead: int = 0
    unroll: int = 1
    warps: int = 4
    tiles: int = 1
    rotate: bool = False
    split: int = 1


# By bucket and bits. ``warps`` is filled in by the shape.
_TABLE = {
    (8, 2): MatmulBlocks(8, 1),
    (8, 3): MatmulBlocks(8, 1),
    (8, 4): MatmulBlocks(8, 2, ahead=2, x_ahead=1, unroll=3),
    (8, 8): MatmulBlocks(8, 2, ahead=2, unroll=3),
    (16, 2): MatmulBlocks(16, 1),
    (16, 3): MatmulBlocks(16, 1),
    (16, 4): MatmulBlocks(16, 2),
    (16, 8): MatmulBlocks(16, 2),
    (32, 2): MatmulBlocks(32, 1),
    (32, 3): MatmulBlocks(32, 1),
    (32, 4): MatmulBlocks(32, 1),
    (32, 8): MatmulBlocks(32, 1),
    (64, 2): MatmulBlocks(64, 1),
    (64, 3): MatmulBlocks(32, 1),  # 32 values to a period: 64 rows of x do not fit the registers
    (64, 4): MatmulBlocks(64, 2),
    (64, 8): MatmulBlocks(64, 2),
}

# Warps that the card holds at once at the registers they take, by the rows of a program, and the warps of a program
# where there are more programs than that. 132 multiprocessors of 64k registers.
_RESIDENT = {8: 2112, 16: 2112, 32: 2112, 64: 1056}
_CROWDED = {8: 4, 16: 4, 32: 4, 64: 4}
_MOST_PARTS = 8


def period_of(bits: int) -> tuple[int, int]:
    """(values, words) of what a lane holds of one column: whole words, values in pairs that lie 16 bits apart."""
    return {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (8, 2)}[bits]


def bucket_of(rows: int) -> int | None:
    """The smallest bucket that holds this many rows, or None."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), None)


def matmul_blocks(rows: int, n_in: int, widths: Sequence[int], bits: int, group: int) -> MatmulBlocks | None:
    """The blocks for x (rows, n_in) and every W (n_in, width) of a launch; None where no blocks do.

    ``group`` is the number of rows in a group. Only how k is shared depends on ``widths``, by the blocks of columns of
    all weights together: what is resident at once does not ask whose columns a program works on.
    A round of a warp must lie in one group, or a step must hold whole groups of whole periods.
    """
    bucket = bucket_of(rows)
    values, _ = period_of(bits)
    depth = 4 * values
    whole = group >= n_in or group % depth == 0
    if bucket is None or not (whole or (depth % group == 0 and group % values == 0)):
        return None
    blocks = _TABLE[min(bucket, 64), bits]
    longer = 2 * blocks.steps
    if bucket == 8 and bits == 4 and (group >= n_in or group % (longer * depth) == 0):
        # Groups that let a round be twice as long need not look two rounds ahead.
        blocks = dataclasses.replace(blocks, steps=longer, ahead=1, x_ahead=0, unroll=1)
    while blocks.steps > 1 and group < n_in and group % (blocks.steps * depth):
        blocks = dataclasses.replace(blocks, steps=blocks.steps // 2)
    if bucket == 8 and len(widths) == 1:
        blocks = _shared(blocks, depth, n_in, widths[0])
        if blocks.split > 1:
            return blocks
    return dataclasses.replace(blocks, warps=_warps(blocks, depth, n_in, widths))


def _shared(blocks: MatmulBlocks, depth: int, n_in: int, n_out: int) -> MatmulBlocks:
    """k shared between as many programs of two warps as are resident at once, if their rounds come out even.

    For a weight of its own that is too narrow to fill the card with programs of four warps: 160 larger ones on 132
    multiprocessors take the time of two in a row. XLA makes the sum of the parts, a few float32 rows, part of what
    comes next; for several weights it would be several sums.
    """
    columns, resident = -(-n_out // (32 * blocks.tiles)), _RESIDENT[blocks.rows]
    most = min(_MOST_PARTS, resident // (2 * columns)) if 4 * columns < 0.8 * resident else 1
    for split in range(most, 1, -1):
        rounds, rest = divmod(n_in, depth * blocks.steps * 2 * split)
        if rest == 0 and rounds >= 4:
            return dataclasses.replace(blocks, warps=2, split=split)
    return blocks


def _warps(blocks: MatmulBlocks, depth: int, n_in: int, widths: Sequence[int]) -> int:
    """As many as are resident at once, 2 to 16, while each still has 8 rounds."""
    programs = sum(-(-n_out // (32 * blocks.tiles)) for n_out in widths)
    resident = _RESIDENT[blocks.rows]
    least = 2 if blocks.rows == 64 else 4
    if programs * least > resident:
        return _CROWDED[blocks.rows]
    warps = least
    rounds = n_in // (depth * blocks.steps)
    while 2 * warps * programs <= resident and 2 * warps <= 16 and rounds >= 16 * warps:
        warps *= 2
    return warps
