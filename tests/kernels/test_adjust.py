"""Every implementation makes the same adjusted weight and the same merged words, bit for bit.

The truth is `lotaqaf_jax.ternary`, itself held to the authors' values and to plain numpy.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.kernels import TernaryAdapter, merge_adapter, weight_matrix
from lotaqaf_jax.ternary import adjusted_weight, merge, ternary_step
from tests.kernels.implementations import IMPLEMENTATIONS, TRITON
from tests.weights import Grid, quantized, random_numbers, random_ternary

# Whole tiles; partial tiles, groups and words; groups larger than a tile's plain size; all of them without tiles.
TILED = (Grid(4, 128, 128, 64), Grid(4, 200, 70, 64), Grid(2, 150, 40, 32), Grid(3, 300, 40, 128), Grid(8, 100, 20, 32))
UNTILED = (Grid(4, 50, 20, -1), Grid(3, 50, 20, -1), Grid(4, 96, 16, 48), Grid(3, 100, 16, 32, act_order=True))
# At 3 bit four periods of 8 values share three words: whole ones, and all rests of them, groups of two and more.
THREE = (Grid(3, 128, 32, 64), Grid(3, 43, 20, 16), Grid(3, 150, 16, 32), Grid(3, 272, 8, 256))
RULES = (("reference", jnp.float32), ("paper", jnp.bfloat16), ("reference", jnp.float16), ("none", jnp.float32))
CASES = [(grid, RULES[i % 4]) for i, grid in enumerate(TILED + UNTILED)] + list(zip(THREE, RULES, strict=True))


def case(grid: Grid, rule: tuple[Any, Any], rank: int = 24, omega: float = 4.3) -> tuple[Any, TernaryAdapter]:
    rng = np.random.default_rng(0)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = random_ternary(rng, grid.n_in, rank), random_ternary(rng, rank, grid.n_out)
    return w, TernaryAdapter(jnp.asarray(a), jnp.asarray(b), omega, rule[0], jnp.dtype(rule[1]))


steps_of = jax.jit(ternary_step, static_argnames="omega")


@functools.cache
def truth_of(grid: Grid, rule: tuple[Any, Any], rank: int = 24) -> tuple[Any, jax.Array]:
    """The merged and the adjusted weight of a case."""
    w, adapter = case(grid, rule, rank)
    settings = {"omega": adapter.omega, "offset": adapter.offset, "offset_dtype": adapter.offset_dtype}
    return jax.jit(
        lambda w, t: (merge(w, t.a, t.b, **settings), adjusted_weight(w, t.a, t.b, **settings)),
    )(w, adapter)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("grid", "rule"), CASES, ids=str)
def test_weight_and_merge(grid: Grid, rule: tuple[Any, Any], implementation: str) -> None:
    w, adapter = case(grid, rule)
    truth, weight = truth_of(grid, rule)

    merged = jax.jit(lambda w, t: merge_adapter(w, t, implementation))(w, adapter)
    np.testing.assert_array_equal(merged.qweight, truth.qweight)
    assert (merged.offset is None) == (adapter.offset == "none")
    if truth.offset is not None:
        assert merged.offset.dtype == truth.offset.dtype
        np.testing.assert_array_equal(merged.offset, truth.offset)
    for pair in ((w, adapter), (truth, None)):
        found = jax.jit(lambda w, t: weight_matrix(w, t, jnp.float32, implementation))(*pair)
        np.testing.assert_array_equal(found, weight)


def test_the_count_is_that_of_moved_integers() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    from lotaqaf_jax.kernels.adjust import gpu

    for grid in (TILED[1], TILED[3], UNTILED[0]):
        w, t = case(grid, RULES[0])
        steps = steps_of(w, t.a, t.b, omega=t.omega)
        merged, moved = gpu.merged(w, t, count=True)
        assert int(moved.sum()) == int(jnp.abs(steps).sum()) > 0
        np.testing.assert_array_equal(merged.integers() - w.integers(), steps)


@pytest.mark.skipif(not TRITON, reason="Triton's interpreter is not there")
@pytest.mark.parametrize(("grid", "rule"), [CASES[i] for i in (1, 2, 4, 6, 9)], ids=str)
def test_the_plain_merge_gives_the_same(grid: Grid, rule: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That of ranks that the packed kernel does not take."""
    from lotaqaf_jax.kernels.adjust import gpu

    monkeypatch.setattr(gpu, "can_pack", lambda bits, rank: False)
    w, adapter = case(grid, rule)
    truth, weight = truth_of(grid, rule)
    np.testing.assert_array_equal(gpu.adjusted(w, adapter, jnp.float32), weight)
    np.testing.assert_array_equal(gpu.merged(w, adapter)[0].qweight, truth.qweight)


@pytest.mark.skipif(not TRITON, reason="Triton's interpreter is not there")
@pytest.mark.parametrize(("bits", "most"), [(2, 128), (3, 256), (4, 256), (8, 512)])
def test_sums_over_a_period_are_exact_up_to_the_highest_rank(bits: int, most: int) -> None:
    """Adapters of ones: D is the rank, and its sum over a period 2048, beyond which float16 leaves integers out."""
    from lotaqaf_jax.kernels.adjust import blocks, gpu

    assert blocks.can_pack(bits, most)
    assert not blocks.can_pack(bits, most + 1)
    grid = Grid(bits, 64, 4, 32)
    w = quantized(random_numbers(np.random.default_rng(0), grid), grid)
    # One D of every group is less by one: the sum over its period is odd, 2047.
    a = jnp.ones((64, most), jnp.int8).at[::32, 0].set(0)
    t = TernaryAdapter(a, jnp.ones((most, 4), jnp.int8), 0.75 * most, "paper", jnp.dtype(jnp.float32))
    steps = np.asarray(steps_of(w, t.a, t.b, omega=t.omega))
    total = 32 * most - 1 - t.omega * steps.reshape(2, 32, 4).sum(axis=1)
    merged, _ = gpu.merged(w, t)
    assert np.any(steps)
    np.testing.assert_array_equal(merged.integers() - w.integers(), steps)
    np.testing.assert_array_equal(merged.offset, total / 32)
