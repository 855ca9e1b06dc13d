"""Every implementation makes the same adjusted weight and the same merged words, bit for bit.

The truth is `lotaqaf_jax.ternary`, itself held to the authors' values and to plain numpy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.kernels import TernaryAdapter, merge_adapter, weight_matrix
from lotaqaf_jax.ternary import adjusted_weight, merge, ternary_step
from tests.kernels.implementations import IMPLEMENTATIONS
from tests.weights import Grid, quantized, random_numbers, random_ternary

# Whole tiles; partial tiles, groups and words; groups larger than a tile's plain size; all of them without tiles.
TILED = (Grid(4, 128, 128, 64), Grid(4, 200, 70, 64), Grid(2, 150, 40, 32), Grid(3, 300, 40, 128), Grid(8, 100, 20, 32))
UNTILED = (Grid(4, 50, 20, -1), Grid(3, 50, 20, -1), Grid(4, 96, 16, 48), Grid(3, 100, 16, 32, act_order=True))
RULES = (("reference", jnp.float32), ("paper", jnp.bfloat16), ("reference", jnp.float16), ("none", jnp.float32))


def case(grid: Grid, rule: tuple[Any, Any], rank: int = 24, omega: float = 4.3) -> tuple[Any, TernaryAdapter]:
    rng = np.random.default_rng(0)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = random_ternary(rng, grid.n_in, rank), random_ternary(rng, rank, grid.n_out)
    return w, TernaryAdapter(jnp.asarray(a), jnp.asarray(b), omega, rule[0], jnp.dtype(rule[1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("grid", "rule"), [(g, RULES[i % 4]) for i, g in enumerate(TILED + UNTILED)], ids=str)
def test_weight_and_merge(grid: Grid, rule: tuple[Any, Any], implementation: str) -> None:
    w, adapter = case(grid, rule)
    settings = {"omega": adapter.omega, "offset": adapter.offset, "offset_dtype": adapter.offset_dtype}
    truth = jax.jit(lambda w, t: merge(w, t.a, t.b, **settings))(w, adapter)
    weight = jax.jit(lambda w, t: adjusted_weight(w, t.a, t.b, **settings))(w, adapter)

    merged = jax.jit(lambda w, t: merge_adapter(w, t, implementation))(w, adapter)
    np.testing.assert_array_equal(merged.qweight, truth.qweight)
    assert (merged.offset is None) == (adapter.offset == "none")
    if truth.offset is not None:
        assert merged.offset.dtype == truth.offset.dtype
        np.testing.assert_array_equal(merged.offset, truth.offset)
    np.testing.assert_array_equal(weight_matrix(w, adapter, jnp.float32, implementation), weight)
    np.testing.assert_array_equal(weight_matrix(truth, None, jnp.float32, implementation), weight)


def test_the_count_is_that_of_moved_integers() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    from lotaqaf_jax.kernels.adjust import gpu

    for grid in (TILED[1], TILED[3], UNTILED[0]):
        w, t = case(grid, RULES[0])
        _, moved = gpu.merged(w, t, count=True)
        assert int(moved.sum()) == int(jnp.abs(ternary_step(w, t.a, t.b, omega=t.omega)).sum()) > 0
