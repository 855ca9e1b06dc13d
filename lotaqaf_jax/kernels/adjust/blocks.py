"""Tile sizes of the kernels in this folder, apart from the kernels; benchmarks/tune.py measures others."""

from __future__ import annotations

import dataclasses
import math

__all__ = [
    "AdjustBlocks",
    "any_packed_blocks",
    "can_pack",
    "dequantize_blocks",
    "merge_blocks",
    "packed_blocks",
    "packed_values",
    "period_of",
    "step_blocks",
]


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


def packed_values(bits: int) -> int:
    """Values of one period of the packed kernel: those of a word, or at 3 bit the 8 of 24 bits."""
    return 8 if bits == 3 else 32 // bits


_PLAIN = {
    2: AdjustBlocks(16, 64, 4),
    3: AdjustBlocks(16, 32, 4),  # 64 columns spill
    4: AdjustBlocks(16, 64, 2),
    8: AdjustBlocks(32, 64, 4),
}
MOST_PERIODS = 64

# Of at least 16 periods, which products sum over; more where a group has more. At 3 bit as at 4, not measured.
_PACKED = {bits: AdjustBlocks(16, 64, 4) for bits in (2, 3, 4)} | {8: AdjustBlocks(32, 64, 4)}
MOST_PACKED_ROWS = 256

_DEQUANTIZE = {bits: AdjustBlocks(16, 128, 4) for bits in (2, 3, 4, 8)}


def can_pack(bits: int, rank: int) -> bool:
    """Whether the sums over a period are exact in float16."""
    return packed_values(bits) * rank <= 2048


def packed_blocks(bits: int, group_size: int) -> AdjustBlocks | None:
    """The tile of the packed kernel that holds whole groups, of two periods or more each; None where there is none."""
    values = packed_values(bits)
    if group_size < 2 * values or group_size & (group_size - 1) or group_size > MOST_PACKED_ROWS:
        return None
    blocks = any_packed_blocks(bits)
    return dataclasses.replace(blocks, periods=max(blocks.periods, group_size // values))


def any_packed_blocks(bits: int) -> AdjustBlocks:
    """The tile of the packed kernel where no sum over a group is wanted."""
    return _PACKED[bits]


def dequantize_blocks(bits: int) -> AdjustBlocks:
    """The tile of dequantise."""
    return _DEQUANTIZE[bits]


def merge_blocks(bits: int, group_size: int) -> AdjustBlocks | None:
    """The plain tile of the merge for a width and group size, or None where groups do not fill tiles.

    Tiles hold whole groups, and groups whole periods, in powers of two, as Triton's shapes are.
    """
    values, _ = period_of(bits)
    periods, rest = divmod(group_size, values)
    if group_size <= 0 or rest or periods & (periods - 1) or periods > MOST_PERIODS:
        return None
    blocks = _PLAIN[bits]
    return dataclasses.replace(blocks, periods=max(blocks.periods, periods))


def step_blocks(bits: int) -> AdjustBlocks:
    """The plain tile of a merge that leaves groups out."""
    return AdjustBlocks(16, 64 if bits == 3 else 128, 4)
