"""One quantised weight on the host, in numpy: what every target converts, and what its result is compared with."""

from __future__ import annotations

import dataclasses

import numpy as np

from lotaqaf_jax.parallel.processes import fetch
from lotaqaf_jax.quant import QuantizedWeight, unpack
from lotaqaf_jax.quant.weight import group_length, trivial_g_idx

__all__ = ["HostWeight", "host_weight", "largest_error"]


@dataclasses.dataclass(frozen=True)
class HostWeight:
    """W[i, j] = scales[g, j] * (integers[i, j] - zeros[g, j] + offset[g, j]), with g = ``g_idx[i]``.

    Attributes:
        integers: (in, out) uint8.
        scales: (groups, out) float, in its stored type.
        zeros: (groups, out) uint8.
        offset: (groups, out) float32, mu of the merge; zeros where the weight has none.
        g_idx: (in,) int32, the group of every row.
        bits: width of an integer.
        group_size: rows in a group; all rows where there is one group.
    """

    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    offset: np.ndarray
    g_idx: np.ndarray
    bits: int
    group_size: int

    def columns(self, start: int, stop: int) -> HostWeight:
        """The part of some outputs."""
        cut = {name: getattr(self, name)[:, start:stop] for name in ("integers", "scales", "zeros", "offset")}
        return dataclasses.replace(self, **cut)

    def spread(self, per_group: np.ndarray) -> np.ndarray:
        """(groups, columns) -> (in, columns): every row has the value of its group."""
        return per_group[self.g_idx]

    def values(self) -> np.ndarray:
        """W, (in, out) float64."""
        shift = self.offset.astype(np.float64) - self.zeros
        return self.spread(self.scales.astype(np.float64)) * (self.integers + self.spread(shift))


def host_weight(weight: QuantizedWeight) -> HostWeight:
    """A weight of one layer off the device."""
    scales = fetch(weight.scales)
    none = weight.offset is None
    return HostWeight(
        integers=fetch(unpack(weight.qweight, weight.bits, weight.shape[0])),
        scales=scales,
        zeros=fetch(weight.zeros),
        offset=np.zeros(scales.shape, np.float32) if none else fetch(weight.offset).astype(np.float32),
        g_idx=trivial_g_idx(weight.shape[0], weight.group_size) if weight.g_idx is None else fetch(weight.g_idx),
        bits=weight.bits,
        group_size=group_length(weight.shape[0], weight.group_size),
    )


def largest_error(values: np.ndarray, weight: HostWeight) -> float:
    """max |values - W| in steps of the grid, which is |scale|; infinite where values are not finite.

    Args:
        values: (in, out) float64, what a target's tensors decode to.
        weight: the weight that they stand for.
    """
    distance = np.abs(values - weight.values())
    step = np.abs(weight.spread(weight.scales.astype(np.float64)))
    # A step of 0 is a column of zeros, which anything but zeros misses.
    relative = np.divide(distance, step, out=np.where(distance > 0, np.inf, 0.0), where=step > 0)
    return float(np.max(relative, initial=0.0)) if np.all(np.isfinite(values)) else float("inf")
