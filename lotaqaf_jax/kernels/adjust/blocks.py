"""Tile sizes of the kernels in this folder, apart from the kernels."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["AdjustBlocks", "can_pack", "merge_blocks", "period_of", "step_blocks"]


@dataclasses.dataclass(frozen=True)
class AdjustBlocks:
    """``periods`` of the bitstream by ``columns`` in a tile, run by ``num_warps`` warps."""

    periods: int
    columns: int
    num_warps: int
    num_stages: int = 1


def period_of(bits: int) -> tuple[int, int]:
    """(values, words) of one period of the bitstream: (8, 1) at 4 bit, (32, 3) at 3 bit."""
    values = 32 // math.gcd(32, bits)
    return values, values * bits // 32


_PLAIN = {
    2: AdjustBlocks(16, 64, 4),
    3: AdjustBlocks(16, 64, 4),
    4: AdjustBlocks(16, 64, 2),
    8: AdjustBlocks(32, 64, 4),
}
_PACKED = AdjustBlocks(64, 32, 4)
MOST_PERIODS = 64


def can_pack(bits: int, rank: int) -> bool:
    """Whether the sums over a period are exact in float16, and no value straddles two words."""
    return bits != 3 and period_of(bits)[0] * rank <= 2048


def merge_blocks(bits: int, group_size: int, *, packed: bool) -> AdjustBlocks | None:
    """The tile of the merge for a width and group size, or None where groups do not fill tiles.

    Tiles hold whole groups, and groups whole periods, in powers of two, as Triton's shapes are.
    """
    values, _ = period_of(bits)
    periods, rest = divmod(group_size, values)
    if group_size <= 0 or rest or periods & (periods - 1) or periods > MOST_PERIODS:
        return None
    blocks = _PACKED if packed else _PLAIN[bits]
    return dataclasses.replace(blocks, periods=max(blocks.periods, periods))


def step_blocks(bits: int) -> AdjustBlocks:
    """The tile of a merge that leaves groups out."""
    return AdjustBlocks(16, 64 if bits == 3 else 128, 4)
