"""Examples into rows of a fixed length, and rows into batches.

Rows are planned once, before the first step, from the lengths alone: so the number of steps of an epoch is
known exactly, which the percentile schedule of t-SignSGD needs, and resuming needs no more than the number of
the next batch. (Grain's own packers work on the stream and cannot say how many rows will come.)
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lotaqaf_jax.data.tokenize import IGNORE, TokenizedExamples

__all__ = ["Batch", "collate", "plan_rows"]

Batch = dict[str, NDArray[np.int32]]
"""``input_ids``, ``labels``, ``positions`` and ``segment_ids``, each (batch, length)."""

Plan = Sequence[Sequence[int]]


def plan_rows(lengths: Sequence[int] | NDArray[np.int64], row_length: int, *, packing: bool, seed: int) -> Plan:
    """Which examples stand in which row.

    With packing, best fit decreasing: the longest example first, each into the fullest row that still has
    room for it. Examples of equal length come in an order drawn from the seed, so that neighbours in the file
    do not end up together. Without packing, a row for each example, in file order.

    Args:
        lengths: (examples,) tokens of each example, none more than ``row_length``.
        row_length: tokens in a row.
        packing: whether to put several examples into a row.
        seed: of the order among equal lengths.

    Returns:
        for each row the indices of its examples; every index occurs once.
    """
    lengths = np.asarray(lengths)
    if lengths.size and lengths.max() > row_length:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into a row of {row_length}")
    if not packing:
        return [[index] for index in range(len(lengths))]
    order = np.random.default_rng([seed, 1]).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens free, row), sorted: the first that is large enough fits best
    for index in order.tolist():
        length = int(lengths[index])
        slot = bisect.bisect_left(free, (length, 0))
        if slot == len(free):
            rows.append([])
            room, row = row_length, len(rows) - 1
        else:
            room, row = free.pop(slot)
        rows[row].append(index)
        if room > length:
            bisect.insort(free, (room - length, row))
    return rows


def collate(
    rows: Sequence[Sequence[int]],
    examples: TokenizedExamples,
    *,
    batch_size: int,
    row_length: int,
    pad_id: int,
) -> Batch:
    """A batch of rows, filled up with padding to ``batch_size`` rows of ``row_length`` tokens.

    Args:
        rows: at most ``batch_size`` rows, each the indices of its examples.
        examples: the tokens.
        batch_size: rows of the batch; those that are missing are all padding.
        row_length: tokens in a row.
        pad_id: the id that padding gets in ``input_ids``.

    Returns:
        the four arrays of the batch contract, (batch_size, row_length) int32: in padding ``segment_ids`` is 0
        and ``labels`` -100; ``positions`` restarts at 0 and ``labels`` is -100 at the first token of every
        example.
    """
    shape = (batch_size, row_length)
    batch: Batch = {
        "input_ids": np.full(shape, pad_id, np.int32),
        "labels": np.full(shape, IGNORE, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    for number, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row, start=1):
            ids, labels = examples[index]
            span = slice(start, start + len(ids))
            batch["input_ids"][number, span] = ids
            batch["labels"][number, span] = labels
            batch["positions"][number, span] = np.arange(len(ids))
            batch["segment_ids"][number, span] = segment
            start += len(ids)
    return batch
