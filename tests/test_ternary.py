"""The method's arithmetic against float64 brute force, the authors' values, and itself after merging."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.ternary import (
    adapter_gradients,
    adjusted_weight,
    check_settings,
    init_adapter,
    merge,
    short_parts,
    ternary_step,
    window,
)
from tests.weights import GRIDS, Grid, quantized, random_numbers, random_ternary

GOLDEN = sorted((Path(__file__).parent / "golden").glob("layer_*.npz"))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Settings of an adapter."""

    rank: int
    omega: float
    offset: Any
    offset_dtype: Any

    def __str__(self) -> str:
        return f"r{self.rank}-omega{self.omega}-{self.offset}-{jnp.dtype(self.offset_dtype).name}"

    @property
    def keywords(self) -> dict[str, Any]:
        """As arguments."""
        return {"omega": self.omega, "offset": self.offset, "offset_dtype": self.offset_dtype}


# Every offset rule, every storage type, integer, fractional and tiny thresholds, each with some grid.
CASES = (
    (GRIDS[0], Rule(8, 5, "reference", jnp.float32)),
    (GRIDS[0], Rule(4, 0.3, "paper", jnp.bfloat16)),
    (GRIDS[1], Rule(6, 2.5, "reference", jnp.float16)),
    (GRIDS[1], Rule(5, 1.7, "paper", jnp.float32)),
    (GRIDS[2], Rule(16, 3.3, "reference", jnp.bfloat16)),
    (GRIDS[2], Rule(8, 6, "none", jnp.float32)),
    (GRIDS[3], Rule(12, 2, "reference", jnp.float32)),
    (GRIDS[3], Rule(8, 2.1, "paper", jnp.float16)),
    (GRIDS[4], Rule(2, 1.9, "reference", jnp.bfloat16)),
    (GRIDS[4], Rule(8, 3, "none", jnp.bfloat16)),
)
case_ids = [f"{grid}-{rule}" for grid, rule in CASES]
every_case = pytest.mark.parametrize(("grid", "rule"), CASES, ids=case_ids)
seeds = st.integers(0, 2**32 - 1)


@functools.partial(jax.jit, static_argnames=("offset", "offset_dtype"))
def jit_adjusted(w: QuantizedWeight, a: jax.Array, b: jax.Array, **rule: Any) -> jax.Array:
    return adjusted_weight(w, a, b, **rule)


@functools.partial(jax.jit, static_argnames=("offset", "offset_dtype"))
def jit_merge(w: QuantizedWeight, a: jax.Array, b: jax.Array, **rule: Any) -> QuantizedWeight:
    return merge(w, a, b, **rule)


jit_dequantize = jax.jit(lambda w: w.dequantize())


def brute_force(numbers: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray, grid: Grid, rule: Rule) -> dict[str, Any]:
    """Eq. 3-5 in float64, entry by entry: the step, the offset before its rounding, and the adjusted weight."""
    d = a.astype(np.int64) @ b.astype(np.int64)
    t = np.zeros_like(d)
    for i, j in np.ndindex(d.shape):
        step = int(np.sign(d[i, j])) if abs(d[i, j]) > rule.omega else 0
        t[i, j] = step if 0 <= numbers["integers"][i, j] + step <= 2**grid.bits - 1 else 0
    rest = d - rule.omega * t
    mean = np.array([rest[numbers["g_idx"] == g].mean(axis=0) for g in range(grid.groups)])
    mu = {"reference": mean / rule.omega, "paper": mean, "none": 0 * mean}[rule.offset]
    g = numbers["g_idx"]
    weight = numbers["scales"].astype(np.float64)[g] * (numbers["integers"] + t - numbers["zeros"][g] + mu[g])
    return {"t": t, "mu": mu, "weight": weight}


@every_case
@settings(max_examples=4, deadline=None)
@given(seed=seeds)
def test_step_offset_and_weight_are_those_of_the_equations(grid: Grid, rule: Rule, seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = random_numbers(rng, grid)
    w = quantized(numbers, grid)
    a, b = random_ternary(rng, grid.n_in, rule.rank), random_ternary(rng, rule.rank, grid.n_out)
    expected = brute_force(numbers, a, b, grid, rule)

    merged = jit_merge(w, a, b, **rule.keywords)
    np.testing.assert_array_equal(merged.integers(), numbers["integers"] + expected["t"])
    if rule.offset == "none":
        assert merged.offset is None
    else:
        assert merged.offset is not None
        assert merged.offset.dtype == rule.offset_dtype
        # A few roundings in float32 before the one to the storage type.
        bound = float(jnp.finfo(rule.offset_dtype).eps) / 2 + 4e-7
        np.testing.assert_allclose(np.asarray(merged.offset, np.float64), expected["mu"], rtol=bound, atol=1e-6)
    stored = np.float64(0) if merged.offset is None else np.asarray(merged.offset, np.float64)[numbers["g_idx"]]
    moved = numbers["integers"] + expected["t"] - numbers["zeros"][numbers["g_idx"]] + stored
    weight = numbers["scales"].astype(np.float64)[numbers["g_idx"]] * moved
    np.testing.assert_allclose(jit_adjusted(w, a, b, **rule.keywords), weight, rtol=3e-7, atol=1e-7)


@every_case
@settings(max_examples=6, deadline=None)
@given(seed=seeds)
def test_the_merged_weight_is_the_adapted_weight_bit_for_bit(grid: Grid, rule: Rule, seed: int) -> None:
    """Both ways of computing it, compiled together, apart, and not at all."""
    rng = np.random.default_rng(seed)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = random_ternary(rng, grid.n_in, rule.rank), random_ternary(rng, rule.rank, grid.n_out)
    adapted = jit_adjusted(w, a, b, **rule.keywords)
    merged = jit_merge(w, a, b, **rule.keywords)
    assert merged.shape == w.shape
    np.testing.assert_array_equal(jit_dequantize(merged), adapted)
    np.testing.assert_array_equal(merged.dequantize(), adapted)
    floats = jit_adjusted(w, a.astype(np.float32), b.astype(np.float32), **rule.keywords)
    np.testing.assert_array_equal(floats, adapted)


@pytest.mark.parametrize(("grid", "rule"), CASES[1:8:3], ids=case_ids[1:8:3])
def test_a_merge_outside_of_jit_gives_the_same_bits(grid: Grid, rule: Rule) -> None:
    rng = np.random.default_rng(1)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = random_ternary(rng, grid.n_in, rule.rank), random_ternary(rng, rule.rank, grid.n_out)
    adapted = jit_adjusted(w, a, b, **rule.keywords)
    np.testing.assert_array_equal(adjusted_weight(w, a, b, **rule.keywords), adapted)
    merged = merge(w, a, b, **rule.keywords)
    for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(jit_merge(w, a, b, **rule.keywords)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@every_case
@settings(max_examples=4, deadline=None)
@given(seed=seeds)
def test_no_integer_leaves_the_grid_or_moves_by_more_than_one(grid: Grid, rule: Rule, seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = random_numbers(rng, grid)
    w = quantized(numbers, grid)
    a = np.sign(random_ternary(rng, grid.n_in, rule.rank) + 1).astype(np.int8)  # mostly 1: |D| is large
    b = np.sign(random_ternary(rng, rule.rank, grid.n_out) + rng.choice([-1, 1])).astype(np.int8)
    merged = jit_merge(w, a, b, **rule.keywords)
    step = np.asarray(merged.integers()) - numbers["integers"]
    assert np.abs(step).max() <= 1
    merged.validate("merged")
    for part in ("scales", "zeros"):
        np.testing.assert_array_equal(getattr(merged, part), getattr(w, part))
    np.testing.assert_array_equal(ternary_step(w, a, b, omega=rule.omega), step)


def one_column(integers: list[int], d: list[int], omega: float, offset: Any) -> QuantizedWeight:
    """Merge into a single column of 4-bit integers adapters whose product is ``d`` (rank 4)."""
    grid = Grid(4, len(integers), 1, -1)
    w = quantized(
        {
            "integers": np.array(integers)[:, None],
            "zeros": np.full((1, 1), 8),
            "scales": np.ones((1, 1), np.float16),
        },
        grid,
    )
    a = np.array([[np.sign(v) * (i < abs(v)) for i in range(4)] for v in d], np.int8)
    return merge(w, jnp.asarray(a), jnp.ones((4, 1), jnp.int8), omega=omega, offset=offset)


def test_the_threshold_is_strict() -> None:
    assert one_column([5, 5, 5, 5], [2, -2, 3, -3], 2, "none").integers()[:, 0].tolist() == [5, 5, 6, 4]


def test_a_blocked_entry_keeps_its_whole_d_in_the_offset() -> None:
    """At 15 a step up, at 0 a step down is not taken; no other entry is clamped for it, nothing wraps."""
    merged = one_column([15, 0, 15, 0], [4, -4, -4, 4], 3, "paper")
    assert merged.integers()[:, 0].tolist() == [15, 0, 14, 1]
    # R = 4, -4 (whole), -4 + 3, 4 - 3: their mean is 0. With one blocked entry only: (4 + 1 + 1 + 1) / 4.
    np.testing.assert_array_equal(merged.offset, [[0.0]])
    np.testing.assert_array_equal(one_column([15, 0, 1, 2], [4, 4, 4, 4], 3, "paper").offset, [[1.75]])
    np.testing.assert_allclose(one_column([15, 0, 1, 2], [4, 4, 4, 4], 3, "reference").offset, [[1.75 / 3]], rtol=1e-7)


@pytest.mark.parametrize("surrogate", ["straight", "window"])
@pytest.mark.parametrize("offset", ["reference", "paper", "none"])
@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_gradients_are_those_of_the_formula(offset: Any, surrogate: Any, seed: int) -> None:
    """dD = h*s*dW' + c*groupmean(s*dW'), dA = dD B^T, dB = A^T dD in float64, with act-order."""
    grid, rank, omega = GRIDS[3], 8, 2.5
    rng = np.random.default_rng(seed)
    numbers = random_numbers(rng, grid)
    w = quantized(numbers, grid)
    a = random_ternary(rng, grid.n_in, rank).astype(np.float32)
    b = random_ternary(rng, rank, grid.n_out).astype(np.float32)
    dweight = rng.normal(size=(grid.n_in, grid.n_out)).astype(np.float32)

    g = numbers["g_idx"]
    dd = numbers["scales"].astype(np.float64)[g] * dweight
    mean = np.array([dd[g == k].mean(axis=0) for k in range(grid.groups)])[g]
    if surrogate == "window":
        d = np.abs(a.astype(np.float64) @ b)
        bump = np.exp(-(((d - omega) / (0.3 * omega)) ** 2))
        dd = dd * np.where(d > omega, np.maximum(bump, 0.2), np.maximum(bump, 0.05))
    dd = dd + {"reference": 1 / omega, "paper": 1.0, "none": 0.0}[offset] * mean
    expected = dd @ b.T.astype(np.float64), a.T.astype(np.float64) @ dd

    rule: Any = {"omega": omega, "offset": offset, "surrogate": surrogate}
    found = jit_gradients(w, a, b, dweight, **rule)
    pulled = jit_pullback(w, a, b, dweight, **rule)
    for formula, autodiff, truth in zip(found, pulled, expected, strict=True):
        np.testing.assert_allclose(formula, truth, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(autodiff, formula)


@functools.partial(jax.jit, static_argnames=("offset", "surrogate"))
def jit_gradients(w: QuantizedWeight, a: jax.Array, b: jax.Array, g: jax.Array, **rule: Any) -> Any:
    return adapter_gradients(w, a, b, g, **rule)


@functools.partial(jax.jit, static_argnames=("offset", "surrogate"))
def jit_pullback(w: QuantizedWeight, a: jax.Array, b: jax.Array, g: jax.Array, **rule: Any) -> Any:
    return jax.vjp(lambda a, b: adjusted_weight(w, a, b, **rule), a, b)[1](g)


def test_the_window_weighs_the_entries_near_the_threshold() -> None:
    h = window(jnp.asarray([0.0, 5.0, -9.0, 10.0, -11.0, 40.0]), 10.0)
    near = np.exp(-((1 / 3) ** 2))
    np.testing.assert_allclose(h, [0.05, np.exp(-((5 / 3) ** 2)), near, 1, near, 0.2], rtol=1e-6)


def test_an_omega_known_only_at_run_time_gives_the_same_bits() -> None:
    """As a constant of the program, and as an argument, also where three parts of eight bits are needed."""
    rng = np.random.default_rng(5)
    grid = GRIDS[1]
    w = quantized(random_numbers(rng, grid), grid)
    a, b = random_ternary(rng, grid.n_in, 8), random_ternary(rng, 8, grid.n_out)
    for omega in (2.0, 2.7182817, 1.1):
        given = jit_merge(w, a, b, omega=omega)
        constant = jax.jit(lambda w, a, b, omega=omega: merge(w, a, b, omega=omega))(w, a, b)
        assert sum(float(part) for part in short_parts(omega)) == np.float32(omega)
        for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(constant), strict=True):
            np.testing.assert_array_equal(one, other)


def test_no_gradient_reaches_the_weight() -> None:
    rng = np.random.default_rng(0)
    w = quantized(random_numbers(rng, GRIDS[0]), GRIDS[0])
    a, b = jnp.ones((64, 4)), jnp.ones((4, 16))
    slope = jax.grad(lambda w: adjusted_weight(w, a, b, omega=3).sum(), allow_int=True)(w)
    np.testing.assert_array_equal(slope.scales, np.zeros_like(slope.scales))


def test_fresh_adapters_are_ternary_and_change_nothing() -> None:
    a, b = init_adapter(jax.random.key(0), 512, 16, 64)
    assert (a.shape, a.dtype, b.shape, b.dtype) == ((512, 64), jnp.int8, (64, 16), jnp.int8)
    assert set(np.unique(a)) == {-1, 0, 1}
    assert not np.any(b)
    # P(|N| > 0.75 E|N|) for a normal N, E|N| = sqrt(2/pi): 0.5496; 512*64 draws scatter by 0.003.
    assert abs(float(jnp.mean(jnp.abs(a))) - 0.5496) < 0.01
    assert abs(float(jnp.mean(a))) < 0.02
    w = quantized(random_numbers(np.random.default_rng(0), Grid(4, 512, 16, 64)), Grid(4, 512, 16, 64))
    np.testing.assert_array_equal(adjusted_weight(w, a, b, omega=48), w.dequantize())
    assert not np.array_equal(a, init_adapter(jax.random.key(1), 512, 16, 64)[0])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_authors_values(path: Path) -> None:
    """Forward, merged words, offset and gradients of the authors' layer, computed by their code in float32."""
    z = np.load(path)
    w = QuantizedWeight.from_gptq(
        z["qweight"],
        z["qzeros_unshifted"],
        z["scales"],
        z["g_idx"],
        bits=int(z["bits"]),
        group_size=int(z["group_size"]),
        checkpoint_format="gptq_v2",
    )
    rule = {"omega": float(z["omega"]), "offset": "reference", "offset_dtype": jnp.float32}
    a, b, x, gy = (jnp.asarray(z[key], jnp.float32) for key in ("A", "B", "x", "gy"))
    weight = jit_adjusted(w, a, b, **rule)
    close(x @ weight, z["y"])
    close(gy @ weight.T, z["grad_x"])
    da, db = jit_gradients(w, a, b, x.T @ gy, omega=rule["omega"], offset="reference")
    close(da, z["grad_A"])
    close(db, z["grad_B"])
    merged = jit_merge(w, a, b, **rule)
    np.testing.assert_array_equal(merged.qweight, z["merged_qweight"])
    close(merged.offset, z["mu"])
    moved = np.abs(ternary_step(w, a, b, omega=rule["omega"])).mean()
    np.testing.assert_allclose(moved, z["flip_fraction"], rtol=1e-6)


def close(found: Any, expected: np.ndarray) -> None:
    """Largest error at most 1e-5 of the largest value."""
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_there_are_values_to_compare_with() -> None:
    assert len(GOLDEN) == 6


@pytest.mark.parametrize(
    ("rank", "omega", "offset", "message"),
    [
        (1, 0.5, "paper", "rank: found 1, expected at least 2"),
        (8, 0, "paper", r"omega: found 0, expected 0 < omega < rank = 8\. The published setting .* = 6"),
        (8, -1.0, "paper", "omega: found -1.0"),
        (8, 8, "paper", "omega: found 8"),
        (8, float("nan"), "paper", "omega: found nan"),
        (8, 6, "mean", r"offset: found 'mean', expected one of \('reference', 'paper', 'none'\)"),
    ],
)
def test_settings_out_of_range_are_named(rank: int, omega: float, offset: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(rank, omega, offset)
    w = quantized(random_numbers(np.random.default_rng(0), GRIDS[0]), GRIDS[0])
    a, b = jnp.zeros((64, rank), jnp.int8), jnp.zeros((rank, 16), jnp.int8)
    for use in (adjusted_weight, merge):
        with pytest.raises(ConfigError, match=message):
            use(w, a, b, omega=omega, offset=offset)


def test_adapters_that_do_not_fit_are_refused() -> None:
    w = quantized(random_numbers(np.random.default_rng(0), GRIDS[0]), GRIDS[0])
    with pytest.raises(
        ValueError, match=r"weight \(64, 16\) must be A \(64, rank\) and B \(rank, 16\); found A \(16, 4\)"
    ):
        adjusted_weight(w, jnp.zeros((16, 4)), jnp.zeros((4, 64)), omega=3)
    fitting = jnp.zeros((64, 4)), jnp.zeros((4, 16))
    with pytest.raises(ValueError, match="already holds a merged offset"):
        merge(merge(w, *fitting, omega=3), *fitting, omega=3)
