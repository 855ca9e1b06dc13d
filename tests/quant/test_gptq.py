"""GPTQ of one layer, held against the definition: optimal brain surgery, one row at a time, in float64."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotaqaf_jax.errors import CheckpointError, ConfigError, DataError
from lotaqaf_jax.quant import grid
from lotaqaf_jax.quant.gptq import GPTQResult, quantize_layer
from lotaqaf_jax.quant.hessian import accumulate_hessian, factor_hessian

GOOD = {"bits": 4, "group_size": 16, "sym": False, "desc_act": False}


def problem(rows: int, out: int, seed: int = 0, samples: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A random weight (rows, out) and the Hessian of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples or 4 * rows, rows)) @ rng.normal(size=(rows, rows)) / np.sqrt(rows)
    x *= np.exp(rng.normal(size=rows))
    return rng.normal(size=(rows, out)).astype(np.float32), (2 * x.T @ x / len(x)).astype(np.float32)


def objective(weight: np.ndarray, result: GPTQResult, hessian: np.ndarray) -> np.ndarray:
    """diag(E^T H E), (out,), in float64, from the result's arrays and the formula of the files."""
    q, z = np.asarray(result.integers, np.float64), np.asarray(result.zeros, np.float64)
    groups = np.asarray(result.g_idx)
    error = weight - np.asarray(result.scales, np.float64)[groups] * (q - z[groups])
    return np.einsum("ij,ik,kj->j", error, hessian.astype(np.float64), error, optimize=True)


@dataclasses.dataclass
class Exact:
    """What the brute force found, and per column how far every decision was from going the other way."""

    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray
    margin: np.ndarray


def to_tie(x: np.ndarray) -> np.ndarray:
    """Distance of x to the nearest half-integer."""
    return np.abs(x - np.floor(x) - 0.5)


def grid_of(group: np.ndarray, bits: int, sym: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale (a float16), zero point and the margin of both, for the rows of one group."""
    top = 2**bits - 1
    low, high = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0)
    if sym:
        high = np.maximum(high, -low)
        low = -high
    wanted = (high - low) / top
    scale = wanted.astype(np.float16).astype(np.float64)
    ulp = np.spacing(scale.astype(np.float16)).astype(np.float64)
    margin = to_tie(wanted / ulp) * ulp / scale
    if sym:
        return scale, np.full(len(scale), 2.0 ** (bits - 1)), margin
    return scale, np.clip(np.round(-low / scale), 0, top), np.minimum(margin, to_tie(-low / scale))


def brute_force(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    act_group_aware: bool = False,
    damp_percent: float = 0.05,
) -> Exact:
    """GPTQ as optimal brain surgery: after each row, the exact inverse of what remains of the Hessian.

    No blocks, no Cholesky factor: H^-1 of the remaining rows R is inverted anew in every step, and
    W[R] -= H_R^-1[:, 0] / H_R^-1[0, 0] * (W[i] - W^[i]).
    """
    w, h = weight.astype(np.float64), hessian.astype(np.float64)
    rows, out = w.shape
    top = 2**bits - 1
    size = rows if group_size == -1 else min(group_size, rows)
    diagonal = np.diag(h).copy()
    dead = diagonal == 0
    w[dead] = 0
    h[dead, dead] = diagonal[~dead].mean()
    h += damp_percent * diagonal[~dead].mean() * np.eye(rows)
    order = np.argsort(-diagonal, kind="stable") if desc_act else np.arange(rows)
    if act_group_aware:
        whole = [range(i, i + size) for i in range(0, rows - size + 1, size)]
        whole.sort(key=lambda group: -max(diagonal[i] for i in group))
        rest = range(rows // size * size, rows)
        order = np.array([i for group in [*whole, rest] for i in sorted(group, key=lambda i: -diagonal[i])])
    w, h = w[order], h[np.ix_(order, order)]
    groups = -(-rows // size)
    integers = np.zeros((rows, out), np.uint8)
    scales, zeros = np.zeros((groups, out), np.float16), np.zeros((groups, out), np.uint8)
    margin = np.full(out, np.inf)
    for i in range(rows):
        if i % size == 0:
            scale, zero, limit = grid_of(w[i : i + size], bits, sym)
            scales[i // size], zeros[i // size] = scale, zero
            margin = np.minimum(margin, limit)
        integers[i] = q = np.clip(np.round(w[i] / scale) + zero, 0, top)
        margin = np.minimum(margin, to_tie(w[i] / scale))
        inverse = np.linalg.inv(h[i:, i:])
        w[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - scale * (q - zero))
    back = np.empty_like(order)
    back[order] = np.arange(rows)
    if act_group_aware:  # the groups are those of the rows as they stand
        own = np.argsort(order[::size])
        return Exact(integers[back], scales[own], zeros[own], np.arange(rows) // size, margin)
    return Exact(integers[back], scales, zeros, (np.arange(rows) // size)[back], margin)


def round_to_nearest(weight: np.ndarray, bits: int, group_size: int, sym: bool) -> GPTQResult:
    """Each group's grid and nearest points, in float64 with float16 scales."""
    integers, scales, zeros = [], [], []
    for start in range(0, len(weight), group_size):
        group = weight[start : start + group_size].astype(np.float64)
        scale, zero, _ = grid_of(group, bits, sym)
        integers.append(np.clip(np.round(group / scale) + zero, 0, 2**bits - 1))
        scales.append(scale)
        zeros.append(zero)
    arrays = np.concatenate(integers), np.stack(scales), np.stack(zeros), np.arange(len(weight)) // group_size
    return GPTQResult(*map(jnp.asarray, arrays), jnp.float32(0))


CASES = [
    # rows, bits, group_size, sym, order: desc_act, act_group_aware or neither
    (64, 4, 16, False, ""),
    (64, 4, 16, False, "desc_act"),
    (64, 3, 16, False, "act_group_aware"),
    (64, 2, 16, True, ""),
    (64, 8, 64, True, "desc_act"),
    (61, 3, 16, False, "desc_act"),  # a partial last group
    (61, 4, 16, True, "act_group_aware"),
    (40, 2, 128, False, ""),  # a group larger than the layer
    (150, 4, -1, False, "desc_act"),  # one group of two blocks
    (150, 3, -1, False, "act_group_aware"),
    (131, 4, -1, True, ""),  # the same with one place to fill
    (200, 3, 129, False, ""),  # two groups of two blocks, each filled up, the last partial
]


@pytest.mark.parametrize(("rows", "bits", "group_size", "sym", "order"), CASES)
def test_equals_brute_force(rows: int, bits: int, group_size: int, sym: bool, order: str) -> None:
    """Every column equals the exact algorithm, unless a decision hung on less than float32 resolves."""
    weight, hessian = problem(rows, 24, seed=rows + bits)
    options = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": order == "desc_act"}
    options["act_group_aware"] = order == "act_group_aware"
    exact = brute_force(weight, hessian, **options)
    result = quantize_layer(weight, hessian, **options)

    assert result.integers.dtype == jnp.uint8
    assert result.zeros.dtype == jnp.uint8
    assert result.scales.dtype == jnp.float16
    assert result.g_idx.dtype == jnp.int32
    np.testing.assert_array_equal(result.g_idx, exact.g_idx)
    clear = exact.margin > 1e-5
    assert clear.mean() > 0.7
    np.testing.assert_array_equal(np.asarray(result.integers)[:, clear], exact.integers[:, clear])
    np.testing.assert_array_equal(np.asarray(result.scales)[:, clear], exact.scales[:, clear])
    np.testing.assert_array_equal(np.asarray(result.zeros)[:, clear], exact.zeros[:, clear])
    # Columns that turned another way at a tie are other solutions, not worse ones.
    loss = jnp.float32(0)
    truth = GPTQResult(*map(jnp.asarray, (exact.integers, exact.scales, exact.zeros, exact.g_idx)), loss)
    np.testing.assert_allclose(
        objective(weight, result, hessian).sum(), objective(weight, truth, hessian).sum(), rtol=0.05
    )


@pytest.mark.parametrize("desc_act", [False, True])
def test_loss_is_the_objective_of_the_hessian_as_given(desc_act: bool) -> None:
    weight, hessian = problem(64, 24, seed=3)
    hessian[7], hessian[:, 7] = 0, 0
    result = quantize_layer(weight, hessian, bits=4, group_size=16, sym=False, desc_act=desc_act)
    np.testing.assert_allclose(result.loss, objective(weight, result, hessian).sum(), rtol=1e-4)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_round_to_nearest(bits: int, sym: bool) -> None:
    for seed in range(6):
        weight, hessian = problem(64, 24, seed)
        result = quantize_layer(weight, hessian, bits=bits, group_size=16, sym=sym, desc_act=False)
        plain = round_to_nearest(weight, bits, 16, sym)
        assert objective(weight, result, hessian).sum() < objective(weight, plain, hessian).sum()


@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False), (4, False), (8, True)])
def test_identity_hessian_is_round_to_nearest(bits: int, sym: bool) -> None:
    weight, _ = problem(64, 24)
    result = quantize_layer(weight, np.eye(64), bits=bits, group_size=16, sym=sym, desc_act=False)
    plain = round_to_nearest(weight, bits, 16, sym)
    np.testing.assert_array_equal(result.integers, plain.integers)
    np.testing.assert_array_equal(result.scales, plain.scales)


@pytest.mark.parametrize(
    ("bits", "sym"), [(2, False), (3, False), (4, False), (8, False), (2, True), (3, True), (8, True)]
)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_weights_on_a_grid_come_back_exactly(bits: int, sym: bool, seed: int) -> None:
    """A grid that its own weights touch at both ends is found again, with nothing lost.

    Symmetric grids are found by the grid search only: the plain one has its ends half a step from max|W|.
    """
    rng = np.random.default_rng(seed)
    groups, size, out = 4, 16, 24
    top = 2**bits - 1
    scales = rng.uniform(1e-3, 2, (groups, out)).astype(np.float16).astype(np.float32)
    zeros = np.full((groups, out), 2 ** (bits - 1)) if sym else rng.integers(0, top + 1, (groups, out))
    integers = rng.integers(0, top + 1, (groups, size, out))
    integers[:, 0], integers[:, 1] = 0, top
    weight = (scales[:, None] * (integers - zeros[:, None]).astype(np.float32)).reshape(-1, out)
    _, hessian = problem(groups * size, 1, seed)

    result = quantize_layer(weight, hessian, bits=bits, group_size=size, sym=sym, desc_act=False, grid_search=sym)
    np.testing.assert_array_equal(result.dequantize(), weight)
    np.testing.assert_array_equal(result.integers, integers.reshape(-1, out))
    np.testing.assert_array_equal(result.zeros, zeros)
    np.testing.assert_array_equal(np.asarray(result.scales, np.float32), scales)
    assert result.loss == 0


def test_true_zero_points_cover_the_whole_range() -> None:
    """Columns of one sign have their zero point at the ends of the range, 0 and 2^bits - 1."""
    weight, hessian = problem(32, 2)
    weight = np.abs(weight) * np.array([1, -1], np.float32)
    result = quantize_layer(weight, hessian, bits=4, group_size=32, sym=False, desc_act=False)
    np.testing.assert_array_equal(result.zeros, [[0, 15]])


@pytest.mark.parametrize("sym", [False, True])
def test_dead_inputs_and_zero_groups(sym: bool) -> None:
    """Rows without calibration become zero and leave the others alone; a group of them has a scale too."""
    weight, hessian = problem(64, 24, seed=5)
    dead = np.zeros(64, bool)
    dead[[3, 17]] = True
    dead[32:48] = True
    hessian[dead], hessian[:, dead] = 0, 0
    result = quantize_layer(weight, hessian, bits=4, group_size=16, sym=sym, desc_act=False)
    back = np.asarray(result.dequantize())
    assert (back[dead] == 0).all()
    assert (np.asarray(result.scales) > 0).all()

    weight[dead] = 123  # whatever stood there
    again = quantize_layer(weight, hessian, bits=4, group_size=16, sym=sym, desc_act=False)
    np.testing.assert_array_equal(again.dequantize(), back)


@pytest.mark.parametrize("group_size", [13, -1, 100])
def test_act_order_groups_by_descending_diagonal(group_size: int) -> None:
    weight, hessian = problem(40, 4)
    hessian[8], hessian[:, 8] = 0, 0
    result = quantize_layer(weight, hessian, bits=4, group_size=group_size, sym=True, desc_act=True)
    size = min(group_size, 40) if group_size > 0 else 40
    expected = np.empty(40, np.int32)
    for place, row in enumerate(sorted(range(40), key=lambda i: -hessian[i, i])):
        expected[row] = place // size
    np.testing.assert_array_equal(result.g_idx, expected)
    assert result.scales.shape == result.zeros.shape == (-(-40 // size), 4)


def test_columns_are_independent() -> None:
    """A layer may be quantised in pieces of its outputs: the pieces are those of the whole."""
    weight, hessian = problem(64, 24)
    factor = factor_hessian(hessian, desc_act=True)
    options = {"bits": 4, "group_size": 16, "sym": False, "desc_act": True}
    whole = quantize_layer(weight, factor, **options)
    pieces = [quantize_layer(weight[:, part], factor, **options) for part in (slice(0, 7), slice(7, 24))]
    for field in ("integers", "scales", "zeros"):
        joined = np.concatenate([getattr(piece, field) for piece in pieces], axis=1)
        # Another width may be compiled to another order of summation: allow a tie here and there.
        assert (np.asarray(getattr(whole, field)) == joined).all(axis=0).mean() > 0.9
    np.testing.assert_allclose(whole.loss, sum(piece.loss for piece in pieces), rtol=1e-2)


def test_a_factor_gives_what_its_hessian_gives() -> None:
    weight, hessian = problem(64, 24)
    options = {"bits": 4, "group_size": 16, "sym": False, "desc_act": True}
    direct = quantize_layer(weight, hessian, damp_percent=0.2, **options)
    shared_factor = factor_hessian(hessian, desc_act=True, damp_percent=0.2)
    jax.tree.map(np.testing.assert_array_equal, direct, quantize_layer(weight, shared_factor, **options))
    with pytest.raises(ValueError, match="desc_act"):
        quantize_layer(weight, shared_factor, **{**options, "desc_act": False})
    factor = factor_hessian(hessian, desc_act=False, together=8)
    with pytest.raises(ValueError, match=r"together=16 do not fit .* together=8"):
        quantize_layer(weight, factor, **{**options, "desc_act": False, "act_group_aware": True})


@pytest.mark.parametrize("desc_act", [False, True])
def test_factor_is_the_cholesky_factor_of_the_inverse(desc_act: bool) -> None:
    _, hessian = problem(40, 1)
    factor = factor_hessian(hessian, desc_act=desc_act, damp_percent=0.1)
    order = np.asarray(factor.order)
    damped = hessian[np.ix_(order, order)] + 0.1 * np.diag(hessian).mean() * np.eye(40)
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(factor.upper, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert (np.diff(np.diag(hessian)[order]) <= 0).all() == desc_act


def test_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = problem(64, 24)
    options = {"bits": 3, "group_size": 16, "sym": False, "desc_act": False}
    one, other = (quantize_layer(weight, hessian * factor, **options) for factor in (1, 2.0**-40))
    np.testing.assert_array_equal(one.integers, other.integers)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [16, -1])
def test_grid_search_lowers_the_rounding_error(sym: bool, group_size: int) -> None:
    """Without feedback (identity Hessian) the search cannot lose in its own norm, in any group and column."""
    rows = 64 if group_size == 16 else 150  # more than are rounded at a time: another norm
    norm = 2.0 if group_size == 16 else 2.4
    weight, _ = problem(rows, 24, seed=8)
    options = {"bits": 2, "group_size": group_size, "sym": sym, "desc_act": False}
    errors = []
    for search in (False, True):
        result = quantize_layer(weight, np.eye(rows), grid_search=search, **options)
        error = np.abs(weight - np.asarray(result.dequantize(), np.float64)) ** norm
        errors.append(error.reshape(-1, rows if group_size == -1 else 16, 24).sum(axis=1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize(("bits", "sym"), [(2, False), (3, True), (4, False)])
def test_grid_search_finds_the_least_objective_of_a_group(bits: int, sym: bool) -> None:
    """In a layer of one group no range that is tried gives less, feedback included: brute force in float64."""
    rows, out, top = 24, 6, 2**bits - 1
    weight, hessian = problem(rows, out, seed=bits)
    options = {"bits": bits, "group_size": rows, "sym": sym, "desc_act": False, "damp_percent": 0.0}
    result = quantize_layer(weight, hessian, grid_search=True, **options)
    w = weight.astype(np.float64)
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    if sym:
        high = np.maximum(high, -low)
        low = -high
    best = np.full(out, np.inf)
    for share in np.arange(24, 101, 2) / 100:
        scale = (share * (high - low) / top).astype(np.float16).astype(np.float64)
        zero = np.full(out, (top + 1) // 2) if sym else np.clip(np.round(-low * share / scale), 0, top)
        moved, error = w.copy(), np.zeros_like(w)
        for i in range(rows):
            q = np.clip(np.round(moved[i] / scale) + zero, 0, top)
            inverse = np.linalg.inv(hessian[i:, i:].astype(np.float64))
            moved[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], moved[i] - scale * (q - zero))
            error[i] = w[i] - scale * (q - zero)
        best = np.minimum(best, np.einsum("ij,ik,kj->j", error, hessian.astype(np.float64), error))
    found = objective(weight, result, hessian)
    plain = objective(weight, quantize_layer(weight, hessian, **options), hessian)
    assert (found <= best * 1.02).all()  # a tie may turn the other way
    assert best.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grid_search_lowers_the_objective_of_a_layer(bits: int) -> None:
    """What one group gains is not lost again in the groups that take its error in."""
    options = {"bits": bits, "group_size": 16, "sym": False, "desc_act": False}
    ratios = []
    for seed in range(6):
        weight, hessian = problem(64, 24, seed)
        one, two = (quantize_layer(weight, hessian, grid_search=search, **options) for search in (True, False))
        ratios.append(objective(weight, one, hessian).sum() / objective(weight, two, hessian).sum())
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.95


def test_scales_round_as_numpy_rounds() -> None:
    """To the nearest float16, ties to even, subnormal ones too, and never to zero or infinity."""
    rng = np.random.default_rng(0)
    values = np.exp(rng.uniform(np.log(2.0**-23), np.log(60000), 5000)).astype(np.float32)
    ties = np.float32(1) + np.arange(64, dtype=np.float32) * np.float32(2.0**-11)
    values = np.concatenate([values, ties])
    rounded = jax.jit(grid._to_float16)(values)
    np.testing.assert_array_equal(rounded, values.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(grid._to_float16(jnp.asarray([0.0, 3e38])), [2.0**-24, 65504])


def test_small_weights_keep_their_scale() -> None:
    """Scales below the normal float16 range (8-bit layers have them) are subnormal, not zero."""
    weight, hessian = problem(64, 24)
    weight *= np.float32(1e-3)
    result = quantize_layer(weight, hessian, bits=8, group_size=16, sym=False, desc_act=False)
    assert (np.asarray(result.scales, np.float32) < 2.0**-14).all()
    assert np.abs(np.asarray(result.dequantize()) - weight).max() < 0.05 * np.abs(weight).max()


def test_hessian_is_a_running_mean() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 5, 12)).astype(np.float32) * 30
    mask = rng.integers(0, 2, (7, 5))
    x[mask == 0] = np.nan  # padding may hold anything
    hessian, count = jnp.zeros((12, 12)), 0
    for part in (slice(0, 1), slice(1, 4), slice(4, 7)):
        hessian, count = accumulate_hessian(hessian, count, x[part], mask[part])
    kept = x[mask == 1].astype(np.float64)
    assert count == len(kept)
    np.testing.assert_allclose(hessian, 2 * kept.T @ kept / len(kept), rtol=1e-5, atol=1e-3)

    half, half_count = accumulate_hessian(jnp.zeros((12, 12)), 0, kept.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert half_count == len(kept)
    empty, none = accumulate_hessian(hessian, count, x[:1], np.zeros((1, 5)))
    assert none == count
    np.testing.assert_allclose(empty, hessian, rtol=1e-6)


def test_singular_hessian_needs_damping_and_gets_it_with_a_warning() -> None:
    """Fewer samples than inputs: the default damping is enough; without it, some is taken, aloud."""
    weight, hessian = problem(64, 24, samples=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_layer(weight, hessian, **GOOD)
    indefinite = hessian - 1e-3 * np.eye(64, dtype=np.float32)
    with pytest.warns(UserWarning, match=r"mlp\.up_proj: damp_percent 0\.0 .*; took 0\.01") as caught:
        result = quantize_layer(weight, indefinite, damp_percent=0.0, name="mlp.up_proj", **GOOD)
    assert len(caught) == 1
    plain = round_to_nearest(weight, 4, 16, sym=False)
    assert objective(weight, result, hessian).sum() < objective(weight, plain, hessian).sum()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"bits": 5}, ConfigError, "bits is 5"),
        ({"group_size": 0}, ConfigError, "group_size is 0"),
        ({"damp_percent": -0.1}, ConfigError, "damp_percent is -0.1"),
        ({"damp_percent": float("nan")}, ConfigError, "damp_percent is nan"),
        (
            {"weight": np.full((32, 4), np.nan, np.float32)},
            CheckpointError,
            "layer: the largest weight is nan",
        ),
        ({"weight": np.full((32, 4), 1e6, np.float32)}, CheckpointError, "float16"),
        ({"weight": np.zeros((31, 4), np.float32)}, ValueError, r"\(31, 4\).*\(32, 32\)"),
        ({"hessian": np.zeros((32, 31), np.float32)}, ValueError, r"\(32, 31\)"),
        ({"hessian": np.zeros((32, 32), np.float32)}, DataError, "zero"),
        ({"hessian": np.full((32, 32), np.inf, np.float32)}, DataError, "not finite"),
        ({"hessian": np.diag([-1.0] + [1e-4] * 31)}, DataError, "positive semidefinite"),
    ],
)
def test_errors_name_what_is_wrong(change: dict, error: type[Exception], match: str) -> None:
    weight, hessian = problem(32, 4)
    arguments = {"weight": weight, "hessian": hessian, **GOOD, **change}
    with pytest.raises(error, match=match):
        quantize_layer(**arguments)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_trained_layer_beats_round_to_nearest(shared: Path, bits: int) -> None:
    """The down projection of a trained model, with the inputs that its own text makes.

    The inputs are a SwiGLU of real token embeddings: far from normal, some channels much larger than others.
    """
    safetensors = pytest.importorskip("safetensors.numpy")
    path = shared / "data/checkpoints/babyllama105/model.safetensors"
    if not path.is_file():
        pytest.skip(f"absent: {path}")
    tensors = {key: value.astype(np.float32) for key, value in safetensors.load_file(path).items()}
    layer = "model.layers.0."
    x = tensors["model.embed_tokens.weight"]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * tensors[layer + "post_attention_layernorm.weight"]
    gate, up = x @ tensors[layer + "mlp.gate_proj.weight"].T, x @ tensors[layer + "mlp.up_proj.weight"].T
    inputs = gate / (1 + np.exp(-gate)) * up
    weight = tensors[layer + "mlp.down_proj.weight"].T
    hessian, _ = accumulate_hessian(jnp.zeros((len(weight), len(weight))), 0, inputs)

    result = quantize_layer(weight, hessian, bits=bits, group_size=32, sym=False, desc_act=False)
    plain = round_to_nearest(weight, bits, 32, sym=False)
    hessian = np.asarray(hessian)
    assert objective(weight, result, hessian).sum() < 0.5 * objective(weight, plain, hessian).sum()
    direct = np.sum((inputs.astype(np.float64) @ (weight - np.asarray(result.dequantize()))) ** 2)
    np.testing.assert_allclose(result.loss, 2 * direct / len(inputs), rtol=1e-2)
