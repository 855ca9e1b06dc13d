"""Random quantised weights and adapters, with the same numbers in plain numpy, which compiles nothing."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.quant.weight import group_count, trivial_g_idx


@dataclasses.dataclass(frozen=True)
class Grid:
    """Sizes of a random weight."""

    bits: int
    n_in: int
    n_out: int
    group_size: int
    act_order: bool = False

    @property
    def groups(self) -> int:
        """Number of groups."""
        return group_count(self.n_in, self.group_size)

    def __str__(self) -> str:
        order = "-actorder" if self.act_order else ""
        return f"w{self.bits}-{self.n_in}x{self.n_out}-g{self.group_size}{order}"


# Whole groups; a partial last group with words that are not full; one group; act-order, with and without a rest.
GRIDS = (
    Grid(2, 64, 16, 32),
    Grid(3, 50, 41, 32),
    Grid(4, 48, 16, -1),
    Grid(4, 64, 16, 16, act_order=True),
    Grid(8, 40, 8, 16, act_order=True),
)


def random_numbers(rng: np.random.Generator, grid: Grid) -> dict[str, np.ndarray]:
    """``integers``, ``zeros``, ``scales`` and ``g_idx``; many integers lie at the two ends of the grid."""
    top = 2**grid.bits - 1
    integers = rng.integers(0, top + 1, (grid.n_in, grid.n_out))
    at_end = rng.random(integers.shape) < 0.3
    g_idx = trivial_g_idx(grid.n_in, grid.group_size)
    return {
        "integers": np.where(at_end, rng.choice([0, top], integers.shape), integers),
        "zeros": rng.integers(0, top + 1, (grid.groups, grid.n_out)),
        "scales": rng.uniform(0.001, 0.1, (grid.groups, grid.n_out)).astype(np.float16),
        "g_idx": rng.permutation(g_idx) if grid.act_order else g_idx,
    }


def packed_words(integers: np.ndarray, bits: int) -> np.ndarray:
    """Integers (in, out) as words (ceil(in * bits / 32), out) int32: the bits of a column's values one after the other,
    each value and each word from its lowest bit on."""
    n_in, n_out = integers.shape
    stream = (integers[:, None] >> np.arange(bits)[:, None] & 1).reshape(n_in * bits, n_out)
    stream = np.pad(stream, ((0, -len(stream) % 32), (0, 0))).reshape(-1, 32, n_out)
    words = stream.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]
    return words.sum(axis=1, dtype=np.uint32).view(np.int32)


def quantized(numbers: dict[str, np.ndarray], grid: Grid) -> QuantizedWeight:
    """The numbers as a ``QuantizedWeight``; stacks of them, with leading axes, as a stack of layers."""
    integers = numbers["integers"].reshape(-1, grid.n_in, grid.n_out)
    words = np.stack([packed_words(layer, grid.bits) for layer in integers])
    return QuantizedWeight(
        qweight=jnp.asarray(words.reshape(*numbers["integers"].shape[:-2], *words.shape[-2:])),
        scales=jnp.asarray(numbers["scales"]),
        zeros=jnp.asarray(numbers["zeros"], jnp.uint8),
        g_idx=jnp.asarray(numbers["g_idx"], jnp.int32) if grid.act_order else None,
        offset=None,
        bits=grid.bits,
        group_size=grid.group_size,
        shape=(grid.n_in, grid.n_out),
    )


def random_ternary(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Ternary int8."""
    return rng.integers(-1, 2, shape, dtype=np.int8)
