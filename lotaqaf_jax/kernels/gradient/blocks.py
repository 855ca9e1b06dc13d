"""Sizes of the gradient kernels' programs, apart from the kernels; measured on one H200 (benchmarks/tune.py)."""

from __future__ import annotations

import dataclasses

__all__ = ["GradientBlocks", "gradient_blocks", "left_split", "right_split"]


@dataclasses.dataclass(frozen=True)
class GradientBlocks:
    """One program: tiles of ``rows`` by ``columns``; ``split`` programs share what is summed over."""

    rows: int
    columns: int
    warps: int
    stages: int
    split: int = 1


_LEFT = {2: GradientBlocks(64, 64, 4, 4), 4: GradientBlocks(64, 64, 4, 2)}
_RIGHT = {2: GradientBlocks(64, 64, 4, 3), 4: GradientBlocks(64, 64, 4, 2)}
# Programs that fill 132 multiprocessors.
_LEFT_PROGRAMS, _RIGHT_PROGRAMS = 400, 800


def gradient_blocks(n_in: int, n_out: int, size: int) -> tuple[GradientBlocks, GradientBlocks]:
    """For P and for Q, of a weight (in, out) whose gradient has ``size`` bytes a value."""
    left, right = _LEFT[size], _RIGHT[size]
    return left_split(left, n_in, n_out), right_split(right, n_in, n_out)


def left_split(blocks: GradientBlocks, n_in: int, n_out: int) -> GradientBlocks:
    """The same tiles in as many programs as fill the card, for P."""
    return dataclasses.replace(blocks, split=_split(n_in, blocks.rows, n_out, blocks.columns, _LEFT_PROGRAMS))


def right_split(blocks: GradientBlocks, n_in: int, n_out: int) -> GradientBlocks:
    """The same for Q."""
    return dataclasses.replace(blocks, split=_split(n_out, blocks.columns, n_in, blocks.rows, _RIGHT_PROGRAMS))


def _split(kept: int, kept_block: int, summed: int, summed_block: int, programs: int) -> int:
    """As many as make so many programs, but each with four tiles at least."""
    blocks = -(-kept // kept_block)
    return max(1, min(-(-programs // blocks), summed // (4 * summed_block)))
