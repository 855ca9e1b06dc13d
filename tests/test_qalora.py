"""QA-LoRA's arithmetic against its equation in float64, and its merge against its own forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotaqaf_jax import qalora
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels import GroupLowRank, merge_adapter, merge_and_count, quantized_linear
from lotaqaf_jax.quant import QuantizedWeight
from tests.weights import GRIDS, Grid, quantized, random_numbers

RANK, ALPHA = 6, 12.0
POOLS: tuple[Any, ...] = ("sum", "mean")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Every grid once, with one pool or the other, and one type of mu or the other.
CASES = [(grid, POOLS[i % 2]) for i, grid in enumerate(GRIDS)]
TYPES = [(grid, DTYPES[i % 3]) for i, grid in enumerate(GRIDS)]

merged_of = jax.jit(merge_adapter)
linear = jax.jit(quantized_linear)


def case(grid: Grid, pool: Any, dtype: Any = jnp.float32, seed: int = 0) -> tuple[QuantizedWeight, GroupLowRank]:
    rng = np.random.default_rng(seed)
    w = quantized(random_numbers(rng, grid), grid)
    a = rng.normal(size=(grid.groups, RANK)).astype(np.float32)
    b = (0.02 * rng.normal(size=(RANK, grid.n_out))).astype(np.float32)
    return w, GroupLowRank(jnp.asarray(a), jnp.asarray(b), ALPHA, pool, jnp.dtype(dtype))


def pooling(w: QuantizedWeight, pool: str) -> np.ndarray:
    """The matrix P with pool(x) = x @ P, (in, groups) float64."""
    groups = np.asarray(w.spread(jnp.arange(w.groups)[:, None]))[:, 0]
    member = (groups[:, None] == np.arange(w.groups)).astype(np.float64)
    return member / member.sum(0) if pool == "mean" else member


def formula(x: np.ndarray, w: QuantizedWeight, t: GroupLowRank) -> np.ndarray:
    """The equation as published, in float64."""
    x, matrix, a, b = (np.asarray(array, np.float64) for array in (x, w.dequantize(), t.a, t.b))
    return x @ matrix + ALPHA / RANK * (x @ pooling(w, t.pool)) @ a @ b


def rows(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("grid", "pool"), CASES, ids=str)
def test_forward_pass_is_the_equation(grid: Grid, pool: Any) -> None:
    w, t = case(grid, pool)
    x = rows(2, 3, grid.n_in)
    expected = formula(np.asarray(x), w, t)
    np.testing.assert_allclose(linear(x, w, t), expected, atol=1e-6 * np.abs(expected).max(), rtol=0)
    assert np.abs(expected - np.asarray(x @ w.dequantize())).max() > 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("grid", [GRIDS[1], GRIDS[4]], ids=str)
def test_average_pooling_is_the_sum_with_a_smaller_a(grid: Grid) -> None:
    w, t = case(grid, "mean")
    smaller = dataclasses.replace(t, a=t.a / w.group_rows(), pool="sum")
    x = rows(4, grid.n_in)
    np.testing.assert_allclose(linear(x, w, t), linear(x, w, smaller), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "dtype"), TYPES, ids=str)
def test_merged_layer_gives_the_same_bits(grid: Grid, dtype: Any) -> None:
    """Compiled alone, inside another program, and not at all: the order of every sum is fixed."""
    w, t = case(grid, "sum", dtype)
    merged = merged_of(w, t)
    np.testing.assert_array_equal(merged.qweight, w.qweight)
    assert merged.offset is not None
    assert merged.offset.dtype == dtype
    stack = jax.jit(lambda ws, ts: jax.lax.map(lambda pair: merge_adapter(*pair), (ws, ts)))(
        *(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one) for one in (w, t))
    )
    for other in (stack.offset[1], merge_adapter(w, t).offset):
        np.testing.assert_array_equal(np.asarray(merged.offset).view(np.uint8), np.asarray(other).view(np.uint8))
    for kind in (jnp.float32, jnp.bfloat16):
        x = rows(5, grid.n_in).astype(kind)
        np.testing.assert_array_equal(linear(x, w, t), linear(x, merged))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-6, 1e-2, 1.0, 50.0]), pool=st.sampled_from(POOLS))
def test_offset_times_scale_is_the_change(seed: int, size: float, pool: Any) -> None:
    w, t = case(GRIDS[1], pool, seed=seed)
    t = dataclasses.replace(t, b=t.b * size)
    change = np.asarray(merged_of(w, t).offset, np.float64) * np.asarray(w.scales, np.float64)
    a, b = (np.asarray(part, np.float64) for part in (t.a, t.b))
    factor = ALPHA / RANK / (np.asarray(w.group_rows()) if pool == "mean" else 1.0)
    # Roundings: one of each product and sum, four after them.
    bound = (2 * RANK + 4) * 2.0**-23 * (np.abs(a) @ np.abs(b)) * factor
    assert (np.abs(change - a @ b * factor) <= bound).all()


@pytest.mark.parametrize(("grid", "pool"), CASES, ids=str)
def test_gradients_are_those_of_the_equation(grid: Grid, pool: Any) -> None:
    w, t = case(grid, pool)
    x, dy = rows(2, 3, grid.n_in), rows(2, 3, grid.n_out, seed=2)
    _, pull = jax.vjp(lambda x, t: quantized_linear(x, w, t), x, t)
    dx, dt = pull(dy)
    flat, dflat, matrix, a, b = (
        np.asarray(array, np.float64)
        for array in (x.reshape(-1, grid.n_in), dy.reshape(-1, grid.n_out), w.dequantize(), t.a, t.b)
    )
    pooled = flat @ pooling(w, pool)
    scale = ALPHA / RANK
    expected = {
        "x": (dflat @ (matrix + scale * pooling(w, pool) @ a @ b).T).reshape(x.shape),
        "a": scale * pooled.T @ dflat @ b.T,
        "b": scale * (pooled @ a).T @ dflat,
    }
    for name, found in (("x", dx), ("a", dt.a), ("b", dt.b)):
        limit = 2e-6 * np.abs(expected[name]).max()
        np.testing.assert_allclose(found, expected[name], atol=limit, rtol=0, err_msg=name)


def test_a_group_without_steps_cannot_be_shifted() -> None:
    w, t = case(GRIDS[0], "sum")
    w = dataclasses.replace(w, scales=w.scales.at[1, 3].set(0))
    merged = merged_of(w, t)
    assert merged.offset is not None
    assert np.isfinite(np.asarray(merged.offset)).all()
    assert merged.offset[1, 3] == 0
    x = rows(4, 64)
    _, pull = jax.vjp(lambda t: quantized_linear(x, w, t), t)
    gradient = pull(jnp.zeros((4, 16)).at[:, 3].set(1.0))[0]
    assert (np.asarray(gradient.a)[1] == 0).all()
    assert (np.asarray(gradient.a)[0] != 0).all()


def test_fresh_adapters_change_no_bit() -> None:
    w, t = case(GRIDS[3], "sum")
    fresh = dataclasses.replace(t, b=jnp.zeros_like(t.b))
    x = rows(3, 64)
    np.testing.assert_array_equal(linear(x, w, fresh), linear(x, w))
    merged, moved = merge_and_count(w, fresh)
    assert int(moved) == 0
    np.testing.assert_array_equal(np.asarray(merged.offset).view(np.uint32), 0)


def test_what_does_not_fit_is_refused() -> None:
    w, t = case(GRIDS[0], "sum")
    with pytest.raises(ValueError, match=r"in 2 groups must be A \(2, rank\) and B \(rank, 16\); found A \(64, 6\)"):
        qalora.merge(w, jnp.zeros((64, 6)), t.b, scale=2.0)
    with pytest.raises(ValueError, match="already holds a merged offset"):
        qalora.merge(merge_adapter(w, t), t.a, t.b, scale=2.0)
    with pytest.raises(ConfigError, match="pool: found 'max', expected one of"):
        qalora.check_pool("max")
