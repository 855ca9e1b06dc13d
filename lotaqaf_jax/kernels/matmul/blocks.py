"""Sizes of the packed matmul's programs, apart from its two kernels: tables by rows, rules for the shape.

Those for few rows were measured on one H200, at 4 bit for all shapes, at 2, 3 and 8 bit for 5120 x 13824. What a round
of a warp waits for is latency, not bandwidth, so the numbers settle how much is in flight: words loaded rounds ahead,
against warps that still fit the registers. Those for many rows follow from the registers and shared memory that the
compiled kernel takes, and were measured at 4 bit for 5120 x 13824 and 13824 x 5120; at 16 rows they lose to the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = [
    "BUCKETS",
    "FewRows",
    "ManyRows",
    "bucket_of",
    "column_blocks",
    "matmul_blocks",
    "parts_of",
    "period_of",
    "resident_programs",
    "shared_parts",
]

BUCKETS = (8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class FewRows:
    """One program of :mod:`.triton`: ``rows`` by 32 * ``tiles`` columns, ``warps`` that share k.

    A round of a warp is ``steps`` steps of four periods. Words are loaded ``ahead`` (1 or 2) rounds before their use, x
    ``x_ahead`` (0 to 2); ``unroll`` rounds are written out; with ``rotate`` programs start in different rounds;
    ``split`` programs share k between them, and their parts are added by XLA.
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


@dataclasses.dataclass(frozen=True)
class ManyRows:
    """One program of :mod:`.many_rows`: ``rows`` by 32 * ``warps`` columns, ``steps`` of four periods in a round.

    With ``halves`` its columns are multiplied in two halves, which takes fewer registers and a wait more. Loads run
    ``stages`` - 1 rounds ahead; a thread may take ``registers``, where that is given; ``split`` programs share k
    between them, and their parts are added by XLA.
    """

    rows: int
    steps: int
    warps: int = 4
    halves: bool = False
    stages: int = 4
    registers: int | None = None
    split: int = 1


# By bucket and bits. ``warps`` is filled in by the shape.
_FEW = {
    (8, 2): FewRows(8, 1),
    (8, 3): FewRows(8, 1),
    (8, 4): FewRows(8, 2, ahead=2, x_ahead=1, unroll=3),
    (8, 8): FewRows(8, 2, ahead=2, unroll=3),
    (16, 2): FewRows(16, 1),
    (16, 3): FewRows(16, 1),
    (16, 4): FewRows(16, 2),
    (16, 8): FewRows(16, 2),
}
_MULTIPROCESSORS = 132
_RESIDENT_WARPS = 16 * _MULTIPROCESSORS
"""What the card holds of them at once at the registers they take, of 64k to a multiprocessor."""
_MOST_PARTS = 8

# By bucket, beyond 16 rows. ``split`` is filled in by the shape; ``steps``, ``stages`` and ``rows`` go down where they
# do not fit.
_MANY = {
    32: ManyRows(32, 2, stages=5),
    64: ManyRows(64, 2, halves=True, registers=168),
    128: ManyRows(64, 2, warps=8, halves=True),
}
_DEPTH = 64
"""Values of k in a round, or of a step where that is longer: the operands of more do not fit the registers."""
_SHARED = 100 * 1024
"""Bytes of shared memory for a program that loads ahead: two fit a multiprocessor."""
_REGISTERS = {16: 112, 32: 128, 64: 184, 128: 255}
"""Of a thread, by rows, as compiled for 4 bit."""


def period_of(bits: int) -> tuple[int, int]:
    """(values, words) of what a lane holds of one column: whole words, values in pairs that lie 16 bits apart."""
    return {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (8, 2)}[bits]


def bucket_of(rows: int) -> int | None:
    """The smallest bucket that holds this many rows, or None."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), None)


def column_blocks(widths: Sequence[int], columns: int) -> int:
    """Blocks of ``columns`` columns of all weights; a block lies in one of them."""
    return sum(-(-n_out // columns) for n_out in widths)


def parts_of(n_in: int, bits: int, group: int) -> int:
    """Groups in a step of four periods; 1 where a step lies in one group of ``group`` rows."""
    return max(1, 4 * period_of(bits)[0] // group) if group < n_in else 1


def matmul_blocks(
    rows: int, n_in: int, widths: Sequence[int], bits: int, group: int, terms: int = 1
) -> FewRows | ManyRows | None:
    """The blocks for x (rows, n_in) and every W (n_in, width) of a launch; None where no blocks do.

    ``group`` is the number of rows in a group, ``terms`` the number of 16-bit numbers that x is the sum of. Only how k
    is shared depends on ``widths``, by the blocks of columns of all weights together: what is resident at once does not
    ask whose columns a program works on.
    A round must lie in one group, or a step must hold whole groups of whole periods.
    """
    bucket = bucket_of(rows)
    values, _ = period_of(bits)
    depth = 4 * values
    whole = group >= n_in or group % depth == 0
    if bucket is None or not (whole or (depth % group == 0 and group % values == 0)):
        return None
    if bucket > 16:
        return _many_rows(bucket, n_in, widths, bits, group, terms)
    blocks = _FEW[bucket, bits]
    longer = 2 * blocks.steps
    if bucket == 8 and bits == 4 and (group >= n_in or group % (longer * depth) == 0):
        # Groups that let a round be twice as long need not look two rounds ahead.
        blocks = dataclasses.replace(blocks, steps=longer, ahead=1, x_ahead=0, unroll=1)
    while blocks.steps > 1 and group < n_in and group % (blocks.steps * depth):
        blocks = dataclasses.replace(blocks, steps=blocks.steps // 2)
    if len(widths) == 1:
        blocks = _narrow(blocks, depth, n_in, widths[0])
        if blocks.split > 1:
            return blocks
    return dataclasses.replace(blocks, warps=_warps(blocks, depth, n_in, widths))


def _narrow(blocks: FewRows, depth: int, n_in: int, n_out: int) -> FewRows:
    """k shared between as many programs of two warps as are resident at once, if their rounds come out even.

    For a weight of its own that is too narrow to fill the card with programs of four warps: 160 larger ones on 132
    multiprocessors take the time of two in a row. XLA makes the sum of the parts, a few float32 rows, part of what
    comes next; for several weights it would be several sums.
    """
    columns = column_blocks((n_out,), 32 * blocks.tiles)
    most = min(_MOST_PARTS, _RESIDENT_WARPS // (2 * columns)) if 4 * columns < 0.8 * _RESIDENT_WARPS else 1
    for split in range(most, 1, -1):
        rounds, rest = divmod(n_in, depth * blocks.steps * 2 * split)
        if rest == 0 and rounds >= 4:
            return dataclasses.replace(blocks, warps=2, split=split)
    return blocks


def _warps(blocks: FewRows, depth: int, n_in: int, widths: Sequence[int]) -> int:
    """As many as are resident at once, 4 to 16, while each still has 8 rounds."""
    programs = column_blocks(widths, 32 * blocks.tiles)
    warps = 4
    rounds = n_in // (depth * blocks.steps)
    while 2 * warps * programs <= _RESIDENT_WARPS and 2 * warps <= 16 and rounds >= 16 * warps:
        warps *= 2
    return warps


def _many_rows(bucket: int, n_in: int, widths: Sequence[int], bits: int, group: int, terms: int) -> ManyRows:
    depth = 4 * period_of(bits)[0]
    parts = parts_of(n_in, bits, group)
    blocks = _MANY[bucket]
    steps = max(1, _DEPTH // depth)
    while steps > 1 and group < n_in and group % (steps * depth):
        steps //= 2
    blocks = dataclasses.replace(blocks, steps=steps)
    if depth > _DEPTH or parts * terms > 1:
        blocks = dataclasses.replace(blocks, registers=None)  # the bound would spill
    while blocks.rows > 16 and _shared(blocks, bits, parts * terms) > _SHARED * 2 // 3:
        blocks = dataclasses.replace(blocks, rows=blocks.rows // 2)
    while blocks.stages > 2 and (blocks.stages - 1) * _shared(blocks, bits, parts * terms) > _SHARED:
        blocks = dataclasses.replace(blocks, stages=blocks.stages - 1)
    return dataclasses.replace(blocks, split=shared_parts(blocks, bucket, n_in, widths, bits))


def _shared(blocks: ManyRows, bits: int, copies: int) -> int:
    """Bytes of a round: words, zeros, scales and offset of every column, and all copies of x."""
    values, words = period_of(bits)
    columns = 32 * blocks.warps
    return blocks.steps * 4 * (4 * words * columns + 2 * values * copies * blocks.rows) + 4 * 9 * columns


def resident_programs(blocks: ManyRows) -> int:
    """How many the card holds at once, by the registers of their threads."""
    registers = blocks.registers or _REGISTERS[blocks.rows]
    return _MULTIPROCESSORS * max(1, 2048 // (registers * blocks.warps))


def shared_parts(blocks: ManyRows, rows: int, n_in: int, widths: Sequence[int], bits: int) -> int:
    """How many programs share k: what makes the sum of all rounds, one behind the other, and of adding parts shortest.

    A program costs about four rounds more than its own.
    """
    programs = column_blocks(widths, 32 * blocks.warps) * -(-rows // blocks.rows)
    rounds = -(-n_in // (blocks.steps * 4 * period_of(bits)[0]))
    resident = resident_programs(blocks)

    def seconds(split: int) -> float:
        in_turn = -(-programs * split // resident) * (-(-rounds // split) + 4)
        adding = 1.5e-6 + split * rows * sum(widths) * 2e-12 if split > 1 else 0.0
        return in_turn * 8e-7 + adding

    return min(range(1, 17), key=seconds)
