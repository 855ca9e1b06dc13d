"""t-SignSGD against the reference's parameters, exact arithmetic, numpy, and optax's test list."""

from __future__ import annotations

import doctest
import functools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lotaqaf_jax.optim import paper_schedule, quantile, reference_schedule, schedules, signsgd, t_signsgd

GOLDEN = Path(__file__).parent / "golden"
FACTORIES = {"reference": reference_schedule, "paper": paper_schedule}
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def ternary(rng, shape, dtype=np.int8):
    return rng.integers(-1, 2, shape).astype(dtype)


def normal(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


# One jit for all: an eager update would compile every operation by itself.
@functools.partial(jax.jit, static_argnums=0)
def step(optimizer, grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(optimizer, params, grads_of_steps):
    """Parameters after every step."""
    state, history = optimizer.init(params), []
    for grads in grads_of_steps:
        params, state = step(optimizer, grads, state, params)
        history.append(params)
    return history


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


# --- exact arithmetic ------------------------------------------------------------------------------------


def exact_tail(schedule, t, total_steps):
    """The published levels in rational numbers, as one minus the quantile level."""
    end = Fraction(4, 5) * total_steps
    top, low, last = Fraction(5, 100), Fraction(1, 1000), Fraction(1, 10000)
    t = Fraction(min(t, total_steps))
    if t <= end:
        return top - t / end * (top - low)
    return low - (t - end) / (total_steps - end) * (low - last) if schedule == "reference" else last


def exact_quantile(magnitudes, level):
    """Linear interpolation between sorted entries at the position level * (n - 1), in rational numbers."""
    ordered = sorted(Fraction(float(m)) for m in magnitudes.ravel())
    position = level * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def exact_step(param, grad, tail, skip_tail=None):
    """The update of one tensor in rational numbers, entry by entry."""
    sigma = exact_quantile(np.abs(grad), 1 - tail)
    ceiling = exact_quantile(np.abs(grad), 1 - skip_tail) if skip_tail is not None else math.inf
    new = param.copy()
    for i, g in np.ndenumerate(grad):
        if abs(float(g)) > 1e-9 and sigma < Fraction(abs(float(g))) < ceiling:
            new[i] = np.clip(param[i] - np.sign(g), -1, 1)
    return new


@st.composite
def problems(draw):
    # Few shapes and numbers of steps, as each compiles anew: the rank has properties of its own below.
    shape = draw(st.sampled_from([(), (1,), (25,), (3, 4), (2, 3, 7)]))
    # Few distinct values make ties, any float makes near ties and large ratios.
    values = draw(st.sampled_from([st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), st.floats(-1e3, 1e3, width=32)]))
    grad = draw(hnp.arrays(np.float32, shape, elements=values))
    param = draw(hnp.arrays(np.int8, shape, elements=st.integers(-1, 1)))
    total_steps = draw(st.sampled_from([1, 7]))
    t = draw(st.integers(1, total_steps + 5))
    return param, grad, draw(st.integers(0, len(shape))), total_steps, t


optimizer_of = functools.cache(t_signsgd)


def at_step(optimizer, params, t):
    return optimizer.init(params)._replace(count=jnp.asarray(t - 1, jnp.int32))


@pytest.mark.parametrize("schedule", ["reference", "paper"])
@PROPERTY
@given(problems())
def test_one_step_is_the_equation_in_exact_arithmetic(schedule, problem):
    param, grad, stacked, total_steps, t = problem
    optimizer = optimizer_of(total_steps, schedule, stacked_axes=stacked, skip_large=False)
    new, _ = step(optimizer, grad, at_step(optimizer, param, t), param)
    expected = param.copy()
    for i in np.ndindex(param.shape[:stacked]):
        expected[i] = exact_step(param[i], grad[i], exact_tail(schedule, t, total_steps))
    assert_same(new, expected)


@PROPERTY
@given(st.sampled_from(["reference", "paper"]), st.integers(1, 2000), st.integers(1, 2500), st.integers(1, 2**24))
def test_rank_is_exact_in_float64(schedule, total_steps, t, entries):
    tail = FACTORIES[schedule](total_steps)(np.asarray(t))
    exact = math.ceil(exact_tail(schedule, t, total_steps) * (entries - 1))
    assert quantile.lower_neighbour(tail, entries) == exact


@PROPERTY
@given(st.fractions(0, 1, max_denominator=1000), st.integers(1, 2**14))
def test_rank_is_exact_where_the_quantile_is_an_entry(tail, multiple):
    # Here tail * (n - 1) is an integer, and rounding could name the next entry.
    entries = tail.denominator * multiple + 1
    assert quantile.lower_neighbour(np.float64(tail), entries) == tail * (entries - 1)


@PROPERTY
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 2, 513, 100_001, 1_000_000]))
def test_rank_in_float32_is_at_most_one_off(total_steps, t, entries):
    tail = reference_schedule(jnp.asarray(total_steps))(t)  # as where total_steps is traced
    exact = math.ceil(exact_tail("reference", t, total_steps) * (entries - 1))
    assert abs(int(quantile.lower_neighbour(tail, entries)) - exact) <= 1


@pytest.mark.parametrize("schedule", ["reference", "paper"])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 300])
def test_schedules_are_the_published_levels(schedule, total_steps):
    factory = FACTORIES[schedule]
    tail = factory(total_steps)
    steps = np.arange(1, total_steps + 4)
    exact = np.array([float(exact_tail(schedule, int(t), total_steps)) for t in steps])
    np.testing.assert_allclose(tail(steps), exact, rtol=1e-13)
    np.testing.assert_allclose(jax.jit(tail)(jnp.asarray(steps)), exact, rtol=2e-5)
    traced = jax.jit(lambda s: factory(s)(jnp.asarray(steps)))(total_steps)
    np.testing.assert_allclose(traced, exact, rtol=2e-5)


@pytest.mark.parametrize("entries", [1_000_003, 1_000_001])
@pytest.mark.parametrize("t", [1, 17, 80, 81, 100])
def test_rank_is_exact_in_large_tensors(entries, t):
    # All magnitudes differ, so ceil(tail * (n - 1)) of them lie above the quantile.
    magnitude = np.random.default_rng(0).permutation(np.arange(1, entries + 1)).astype(np.float32)
    param = np.zeros(entries, np.int8)
    optimizer = optimizer_of(100, skip_large=False)
    new, _ = step(optimizer, magnitude, at_step(optimizer, param, t), param)
    moved = math.ceil(exact_tail("reference", t, 100) * (entries - 1))
    np.testing.assert_array_equal(np.asarray(new), np.where(magnitude > entries - moved, -1, 0))


@pytest.mark.parametrize("level", [0.95, 0.987, 0.999, 0.9999, 0.5, 0.0, 1.0])
def test_threshold_is_numpys_quantile(level):
    grad = normal(np.random.default_rng(1), (211, 37))
    param = np.zeros(grad.shape, np.int8)
    optimizer = t_signsgd(None, 1 - level)
    new, _ = step(optimizer, grad, optimizer.init(param), param)
    moves = np.abs(grad) > np.quantile(np.abs(grad).astype(np.float64), level)
    np.testing.assert_array_equal(np.asarray(new), np.where(moves, -np.sign(grad), 0))


@PROPERTY
@given(st.sampled_from([1, 2, 31]), st.data())
def test_kth_largest_is_the_sorted_entry(entries, data):
    largest = float(np.finfo(np.float32).max)
    rows = data.draw(hnp.arrays(np.float32, (2, entries), elements=st.floats(0, largest, width=32)))
    rank = data.draw(st.integers(0, entries - 1))
    found = jax.jit(quantile.kth_largest, static_argnums=2)(rows, rank, (1,))
    np.testing.assert_array_equal(found, np.sort(rows, axis=1)[:, ::-1][:, rank : rank + 1])


# --- the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["t_signsgd_small", "t_signsgd_large_grads"])
def test_parameters_are_those_of_the_reference_after_every_step(name, dtype):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        total_steps, indices = int(golden["steps"]), range(int(golden["n"]))
        params = [golden[f"init_{i}"].astype(dtype) for i in indices]
        grads = [[golden[f"grads_{i}"][t] for i in indices] for t in range(total_steps)]
        expected = [[golden[f"params_{i}"][t].astype(dtype) for i in indices] for t in range(total_steps)]
    for got, want in zip(run(t_signsgd(total_steps), params, grads), expected, strict=True):
        assert_same(got, want)


def test_large_gradients_are_skipped_late_and_only_if_the_norm_of_all_is_large():
    rng = np.random.default_rng(2)
    params = [np.zeros((40, 5), np.int8), np.zeros((1, 300), np.int8)]
    small, large = normal(rng, (40, 5)), normal(rng, (1, 300))

    def after(t, grads, **options):
        optimizer = optimizer_of(10, **options)
        return step(optimizer, grads, at_step(optimizer, params, t), params)[0]

    def expected(t, grads, skip_tail=None, schedule="reference"):
        tail = exact_tail(schedule, t, 10)
        return [exact_step(p, g, tail, skip_tail) for p, g in zip(params, grads, strict=True)]

    grads = [small / 100, large]  # the norm of both counts: the first alone is far below 10
    calm = [small / 100, large / 100]
    skipped = expected(9, grads, Fraction(5, 100_000))
    assert_same(after(9, grads), skipped)
    assert not np.array_equal(skipped[0], expected(9, grads)[0])
    assert_same(after(8, grads), expected(8, grads))
    assert_same(after(9, calm), expected(9, calm))
    assert_same(after(9, grads, skip_large=False), expected(9, grads))
    assert_same(after(9, grads, schedule="paper"), expected(9, grads, None, "paper"))
    assert_same(after(9, grads, schedule="paper", skip_large=True), expected(9, grads, Fraction(5, 100_000), "paper"))


@pytest.mark.parametrize(("entries", "skipped"), [(20_000, 1), (20_001, 2), (40_000, 2), (40_001, 3)])
def test_as_many_large_gradients_are_skipped_as_reach_the_quantile(entries, skipped):
    # All magnitudes differ: floor(0.00005 * (n - 1)) + 1 of them are at or above the 0.99995 quantile.
    grad, param = np.arange(1, entries + 1, dtype=np.float32), np.zeros(entries, np.int8)
    optimizer = optimizer_of(100)
    new, _ = step(optimizer, grad, at_step(optimizer, param, 81), param)
    moved = math.ceil(exact_tail("reference", 81, 100) * (entries - 1))
    assert_same(new, np.where((grad > entries - moved) & (grad <= entries - skipped), -1, 0).astype(np.int8))


# --- ties, edges, bad values -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4, 6)])
def test_nothing_exceeds_the_quantile_of_equal_magnitudes(shape):
    param, grad = np.ones(shape, np.int8), np.full(shape, 3.0, np.float32)
    optimizer = t_signsgd(10)
    assert_same(run(optimizer, param, [grad] * 10)[-1], param)


def test_layers_of_single_entries_never_move():
    param, grad = np.zeros(5, np.int8), np.arange(5, dtype=np.float32)
    assert_same(run(t_signsgd(3, stacked_axes=1), param, [grad])[-1], param)


@pytest.mark.parametrize(("tau", "moved"), [(0.0, 1), (0.99, 1), (1.0, 0), (2.0, 0)])
def test_tau_is_a_strict_floor(tau, moved):
    grad = np.array([0.0, 0.0, 1.0], np.float32)
    new = run(t_signsgd(10, "paper", tau=tau), np.zeros(3, np.int8), [grad])[-1]
    assert_same(new, np.array([0, 0, -moved], np.int8))


def test_tau_default_is_1e_9():
    grad = np.array([[0.0, 1e-9], [0.0, 1.1e-9]], np.float32)
    new = run(t_signsgd(10, stacked_axes=1), np.zeros((2, 2), np.int8), [grad])[-1]
    assert_same(new, np.array([[0, 0], [0, -1]], np.int8))


def test_a_tensor_with_a_gradient_that_is_not_finite_stays_and_its_neighbours_move():
    rng = np.random.default_rng(3)
    params = {"stack": np.zeros((2, 30, 3), np.int8), "other": np.zeros((1, 50), np.int8)}
    grads = {"stack": normal(rng, (2, 30, 3)), "other": normal(rng, (1, 50))}
    optimizer = t_signsgd(10, stacked_axes=1)
    good = run(optimizer, params, [grads])[-1]
    assert np.asarray(good["stack"][0]).any()
    for bad in (np.nan, np.inf, -np.inf):
        grads["stack"][0, 4, 1] = bad
        new = run(optimizer, params, [grads])[-1]
        assert not new["stack"][0].any()
        np.testing.assert_array_equal(new["stack"][1], good["stack"][1])
        np.testing.assert_array_equal(new["other"], good["other"])


def test_nones_masked_nodes_and_empty_arrays_pass_through():
    rng = np.random.default_rng(4)
    array, grad = np.zeros((6, 6), np.int8), normal(rng, (6, 6))
    empty = np.zeros((0, 4), np.int8)
    params = {"a": array, "none": None, "masked": optax.MaskedNode(), "empty": empty, "frozen": array}
    grads = {**params, "a": grad, "empty": empty.astype(np.float32), "frozen": None}
    for beta in (None, 0.5):
        optimizer = t_signsgd(5, beta=beta)
        state = optimizer.init(params)
        new, new_state = step(optimizer, grads, state, params)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert np.asarray(new["a"]).any()
        assert_same({**new, "a": array}, params)


@pytest.mark.parametrize("tree", [{}, [], ()])
def test_empty_trees(tree):
    new, state = step(t_signsgd(5), tree, t_signsgd(5).init(tree), tree)
    assert new == tree
    assert state.count == 1


# --- stacked layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("total_steps", [1, 10])
def test_a_stack_is_its_layers_as_separate_tensors(total_steps):
    rng = np.random.default_rng(5)
    stack = ternary(rng, (3, 2, 20, 4))
    grads = [normal(rng, stack.shape) * 10 for _ in range(total_steps)]  # large enough for skip_large
    stacked = run(t_signsgd(total_steps, stacked_axes=2), stack, grads)

    def separate(array):
        return {i: array[i] for i in np.ndindex(3, 2)}

    layers = run(t_signsgd(total_steps), separate(stack), [separate(g) for g in grads])
    for got, want in zip(stacked, layers, strict=True):
        assert_same(separate(np.asarray(got)), want)


def test_stacked_axes_may_depend_on_the_parameter():
    rng = np.random.default_rng(6)
    params = {"layers": ternary(rng, (3, 10, 4)), "head": ternary(rng, (10, 4))}
    grads = {name: normal(rng, p.shape) for name, p in params.items()}
    by_name = t_signsgd(5, stacked_axes=lambda path, _: int(path[0].key == "layers"))
    new = run(by_name, params, [grads])[-1]
    for name, stacked in (("layers", 1), ("head", 0)):
        assert_same(new[name], run(t_signsgd(5, stacked_axes=stacked), params[name], [grads[name]])[-1])


# --- averaging over steps --------------------------------------------------------------------------------


def test_without_beta_the_state_is_the_count_alone():
    params = {"a": np.zeros((3, 4), np.int8)}
    for beta in (None, 0.0, 0):
        assert jax.tree.leaves(t_signsgd(5, beta=beta).init(params)) == [0]


def test_beta_zero_in_an_array_is_the_published_rule():
    rng = np.random.default_rng(7)
    param, grads = ternary(rng, (12, 9)), [normal(rng, (12, 9)) for _ in range(6)]
    averaged = run(t_signsgd(6, beta=jnp.zeros(())), param, grads)
    assert_same(averaged, run(t_signsgd(6), param, grads))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_beta_is_the_bias_corrected_average(dtype):
    # Dyadic gradients and beta keep the float32 average exact, so that the float64 loop must agree.
    rng = np.random.default_rng(8)
    param = ternary(rng, (16, 8))
    grads = [rng.permutation(np.arange(-64, 64)).reshape(16, 8) / 64 for _ in range(8)]
    got = run(t_signsgd(8, "paper", beta=0.75, tau=0.5), param, [g.astype(dtype) for g in grads])
    average = np.zeros(param.shape)
    for t, (grad, new) in enumerate(zip(grads, got, strict=True), 1):
        average = 0.75 * average + 0.25 * grad
        corrected = average / (1 - 0.75**t)
        sigma = np.quantile(np.abs(corrected), float(1 - exact_tail("paper", t, 8)))
        moves = np.abs(corrected) > max(0.5, sigma)
        param = np.clip(param - np.sign(corrected) * moves, -1, 1).astype(np.int8)
        assert_same(new, param)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_accumulator_dtype(dtype):
    params = [np.zeros((5, 5), np.int8)]
    optimizer = t_signsgd(5, beta=0.9, accumulator_dtype=dtype)
    state = optimizer.init(params)
    _, new_state = step(optimizer, [np.ones((5, 5), np.float16)], state, params)
    assert state.average[0].dtype == new_state.average[0].dtype == (dtype or jnp.float32)
    np.testing.assert_allclose(new_state.average[0].astype(np.float32), 0.1, rtol=1e-2)


# --- as an optax transformation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(np.int8, {}), (np.float32, {}), (jnp.bfloat16, {"schedule": "paper"}), (np.int8, {"beta": 0.9})],
)
def test_converges_on_a_ternary_least_squares_problem(dtype, options):
    rng = np.random.default_rng(9)
    design, _ = np.linalg.qr(rng.standard_normal((60, 12)))
    design = (design * rng.uniform(1, 2, 12)).astype(np.float32)
    target = {"A": ternary(rng, (12, 4), np.float32), "B": ternary(rng, (12, 3), np.float32)}

    # A weight for every column: where the largest gradients of a tensor are equal, none is above the quantile.
    weights = {k: rng.uniform(1, 2, target[k].shape[1]).astype(np.float32) for k in target}

    def loss(params):
        return sum(jnp.sum(weights[k] * (design @ (params[k] - target[k])) ** 2) for k in target)

    params = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), target)
    optimizer = t_signsgd(200, **options)

    def body(carry, _):
        grads = jax.grad(loss)(optax.tree.cast(carry[0], jnp.float32))
        return step(optimizer, grads, carry[1], carry[0]), None

    (params, _), _ = jax.lax.scan(body, (params, optimizer.init(params)), length=200)
    assert_same(params, jax.tree.map(lambda p: p.astype(dtype), target))


@pytest.mark.parametrize("beta", [None, 0.9])
def test_jit_compiles_once_and_scan_equals_the_loop(beta):
    rng = np.random.default_rng(10)
    params = {"a": ternary(rng, (8, 6)), "b": ternary(rng, (3, 7), np.float32)}
    grads = [{k: normal(rng, p.shape) for k, p in params.items()} for _ in range(12)]
    optimizer, traces = t_signsgd(10, beta=beta), []

    @jax.jit
    def counted(grads, state, params):
        traces.append(1)
        return step(optimizer, grads, state, params)

    looped, state = params, optimizer.init(params)
    for g in grads:
        looped, state = counted(g, state, looped)
    assert len(traces) == 1

    def body(carry, g):
        return step(optimizer, g, carry[1], carry[0]), None

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    (scanned, scanned_state), _ = jax.lax.scan(body, (params, optimizer.init(params)), stacked)
    assert_same(scanned, looped)
    assert scanned_state.count == state.count == 12


def test_steps_beyond_the_last_stay_at_its_level():
    grad, param = normal(np.random.default_rng(11), (30, 30)), np.zeros((30, 30), np.int8)
    for schedule in ("reference", "paper"):
        optimizer = t_signsgd(10, schedule)
        at_end, beyond = (step(optimizer, grad, at_step(optimizer, param, t), param)[0] for t in (10, 10_000))
        assert_same(beyond, at_end)
        assert np.asarray(at_end).any() == (schedule == "paper")  # the other skips its only candidate


def test_inject_hyperparams_changes_no_result_and_its_numbers_can_be_set():
    rng = np.random.default_rng(12)
    params = {"a": ternary(rng, (30, 20)), "b": ternary(rng, (5, 40))}
    grads = [{k: normal(rng, p.shape) for k, p in params.items()} for _ in range(10)]
    inject = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    for options in ({}, {"schedule": 0.02, "tau": 0.1, "beta": 0.5}):
        injected = run(inject(t_signsgd)(10, **options), params, grads)
        assert_same(injected, run(t_signsgd(10, **options), params, grads))

    optimizer = inject(t_signsgd)(10)
    state = optimizer.init(params)
    assert set(state.hyperparams) == {"total_steps", "tau"}
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(t_signsgd(10).init(params))
    state.hyperparams["tau"] = jnp.asarray(1e9)
    assert_same(step(optimizer, grads[0], state, params)[0], params)

    static = inject(t_signsgd, static_args=("stacked_axes", "schedule"))
    options = {"stacked_axes": 1, "schedule": paper_schedule(10)}
    assert_same(run(static(10, **options), params, grads), run(t_signsgd(10, **options), params, grads))
    with pytest.raises(ValueError, match="static_args"):
        run(inject(t_signsgd)(10, stacked_axes=1), params, grads)


@pytest.mark.parametrize("dtype", [np.int8, np.float32, jnp.bfloat16])
def test_multi_steps_is_one_step_with_the_mean_gradient(dtype):
    rng = np.random.default_rng(13)
    param = ternary(rng, (12, 12), dtype)
    grads = rng.integers(-1000, 1000, (3, 4, 12, 12)).astype(np.float32)
    optimizer = optax.MultiSteps(t_signsgd(3), every_k_schedule=4)
    wrapped = run(optimizer, param, list(grads.reshape(12, 12, 12)))
    means = []
    for micro in grads:  # the running mean that MultiSteps takes
        mean = jnp.zeros((12, 12))
        for n, g in enumerate(micro):
            mean = mean + (g - mean) / (n + 1)
        means.append(mean)
    assert_same(wrapped[3::4], run(t_signsgd(3), param, means))
    assert_same(wrapped[:3], [param] * 3)


def test_masked_multi_transform_and_chain():
    rng = np.random.default_rng(14)
    params = {"lora": ternary(rng, (10, 10)), "bias": jnp.ones(3)}
    grads = {"lora": normal(rng, (10, 10)), "bias": jnp.ones(3)}
    alone = run(t_signsgd(5, check=True), params["lora"], [grads["lora"]] * 5)
    labels = {"lora": "ternary", "bias": "dense"}
    split = optax.multi_transform({"ternary": t_signsgd(5, check=True), "dense": optax.sgd(0.5)}, labels)
    masked = optax.chain(
        optax.masked(t_signsgd(5, check=True), {"lora": True, "bias": False}),
        optax.masked(optax.scale(-0.5), {"lora": False, "bias": True}),
    )
    for optimizer in (split, masked):
        got = run(optimizer, params, [grads] * 5)
        assert_same([p["lora"] for p in got], alone)
        np.testing.assert_allclose(got[-1]["bias"], 1 - 5 * 0.5)
    # Signs and order do not depend on the scale of the gradient.
    scaled = optax.chain(optax.clip_by_global_norm(1.0), t_signsgd(5, "paper"))
    plain = run(t_signsgd(5, "paper"), params["lora"], [grads["lora"]] * 5)
    assert_same(run(scaled, params["lora"], [grads["lora"]] * 5), plain)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float16, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("grad_dtype", [np.float16, jnp.bfloat16, np.float32])
def test_updates_have_the_type_of_the_parameters(dtype, grad_dtype):
    param, grad = jnp.zeros((9, 9), dtype), jnp.ones((9, 9), grad_dtype)
    for beta in (None, 0.9):
        optimizer = t_signsgd(5, beta=beta)
        updates, _ = jax.eval_shape(optimizer.update, grad, optimizer.init(param), param)
        assert updates.dtype == dtype
        assert jax.eval_shape(optax.apply_updates, param, updates).dtype == dtype


def test_custom_schedule_counts_steps_from_one():
    # One step moves three of eleven entries, the next one none, the third all but the smallest.
    tails = jnp.array([np.nan, 0.3, 0.0, 1.0])
    grad = np.arange(1, 12, dtype=np.float32)
    param = np.zeros(11, np.int8)
    optimizer = t_signsgd(None, lambda t: tails[t])
    moved = [int(-np.asarray(p).sum()) for p in run(optimizer, param, [grad] * 3)]
    assert moved == [3, 3, 10]


def test_extra_arguments_are_accepted_and_the_state_can_be_mapped():
    params = {"a": np.zeros((3, 3), np.int8)}
    optimizer = t_signsgd(5, beta=0.9, check=True)
    state = optimizer.init(params)
    jax.jit(optimizer.update)({"a": np.ones((3, 3), np.float32)}, state, params, value=1.0)
    mapped = optax.tree.map_params(optimizer, lambda m: m + 1, state)
    assert_same(mapped.average, {"a": np.ones((3, 3), np.float32)})
    assert mapped.count == 0
    assert optax.tree.get(state, "count") == 0


def check_sharding_is_unchanged(axis_type):
    """Run on whatever devices there are; the mesh divides the layers, then the rows of each layer."""
    rng = np.random.default_rng(16)
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(axis_type,))
    param, grads = ternary(rng, (4, 16, 8)), [normal(rng, (4, 16, 8)) for _ in range(3)]
    optimizer = t_signsgd(3, beta=0.75, stacked_axes=1)
    expected = run(optimizer, param, grads)
    for spec in (("x", None, None), (None, "x", None)):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        new = jax.device_put(param, sharding)
        state = optimizer.init(new)
        for grad, want in zip(grads, expected, strict=True):
            new, state = step(optimizer, jax.device_put(grad, sharding), state, new)
            assert_same(new, want)
            for array in (new, state.average):
                assert array.sharding.is_equivalent_to(sharding, 3), (spec, array.sharding)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharding_is_unchanged_on_this_machines_devices(axis_type):
    check_sharding_is_unchanged(jax.sharding.AxisType[axis_type])


def test_sharding_is_unchanged_on_four_devices():
    code = (
        "import jax, test_optim\n"
        "assert len(jax.devices()) == 4\n"
        "for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):\n"
        "    test_optim.check_sharding_is_unchanged(axis_type)\n"
    )
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- errors and documentation ----------------------------------------------------------------------------


def test_check_names_the_parameter_and_the_value():
    params = {"layer": {"A": np.zeros((2, 3), np.float32), "B": np.array([[1.0, 0.5]], np.float32)}}
    with pytest.raises(ValueError, match=r"\['layer'\]\['B'\] is 0\.5 at \(0, 1\)"):
        t_signsgd(5, check=True).init(params)
    t_signsgd(5).init(params)
    params["layer"]["B"][0, 1] = -1
    t_signsgd(5, check=True).init(params)
    with pytest.raises(ValueError, match="nan"):
        t_signsgd(5, check=True).init(np.array([np.nan, 0.0]))


def test_check_is_silent_where_values_are_unknown():
    assert jax.jit(t_signsgd(5, check=True).init)(jnp.full((2, 2), 7.0)).count == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps is 0"),
        ({"total_steps": -3, "schedule": "paper"}, ValueError, "total_steps is -3"),
        ({"total_steps": 2.5}, TypeError, "float"),
        ({"total_steps": None}, ValueError, "total_steps is None"),
        ({"total_steps": None, "schedule": 0.1, "skip_large": True}, ValueError, "total_steps is None"),
        ({"total_steps": 5, "schedule": "linear"}, ValueError, "schedule is 'linear'.*reference.*paper"),
        ({"total_steps": 5, "schedule": 5.0}, ValueError, "schedule is 5.0"),
        ({"total_steps": 5, "tau": -1.0}, ValueError, "tau is -1.0"),
        ({"total_steps": 5, "beta": 1.0}, ValueError, "beta is 1.0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        t_signsgd(**arguments)


@pytest.mark.parametrize("factory", [reference_schedule, paper_schedule])
def test_schedules_need_a_step(factory):
    with pytest.raises(ValueError, match="total_steps is 0"):
        factory(0)


def test_update_names_what_does_not_fit():
    params = {"A": np.zeros((2, 3), np.int8)}
    grads = {"A": np.ones((2, 3), np.float32)}
    optimizer = t_signsgd(5)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(grads, state)
    with pytest.raises(ValueError, match=r"\['A'\] has shape \(3, 2\), expected \(2, 3\)"):
        optimizer.update({"A": np.ones((3, 2), np.float32)}, state, params)
    float0 = jax.grad(lambda p: p["A"].sum() * 1.0, allow_int=True)(params)
    with pytest.raises(ValueError, match=r"\['A'\] is .*float0.*float copy"):
        optimizer.update(float0, state, params)
    with pytest.raises(ValueError, match=r"stacked_axes is 3 for parameter \['A'\]"):
        t_signsgd(5, stacked_axes=3).update(grads, state, params)
    for dtype in (np.uint8, np.bool_, np.complex64):
        with pytest.raises(ValueError, match=r"\['A'\] is .*expected a float or signed integer"):
            optimizer.init({"A": np.zeros(3, dtype)})


@pytest.mark.parametrize("module", [schedules, signsgd])
def test_documented_examples(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
