"""Optimizers on latents against float64 arithmetic in numpy, exact arithmetic, and optax's own wrappers."""

from __future__ import annotations

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lotaqaf_jax.optim import LatentState, latent, ternary_adam, with_latents

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


def run(optimizer, params, grads_of_steps, state=None):
    """Parameters after every step, and the last state."""
    state, history = optimizer.init(params) if state is None else state, []
    for grads in grads_of_steps:
        params, state = step(optimizer, grads, state, params)
        history.append(params)
    return history, state


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def rounded(latents):
    return np.where(np.abs(latents) > 0.5, np.sign(latents), 0)


# --- the equation ----------------------------------------------------------------------------------------


def numpy_adam(param, grads, rate, b1, b2, eps, bound):
    """Latents after every step, in float64; ``rate`` is a function of the steps made before."""
    latents = param.astype(np.float64)
    mean, square = np.zeros_like(latents), np.zeros_like(latents)
    for t, grad in enumerate(np.asarray(grads, np.float64), 1):
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        update = -rate(t - 1) * (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + eps)
        latents = np.clip(latents + update, -bound, bound)
        yield latents


@pytest.mark.parametrize("dtype", [np.int8, np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rate", "options"),
    [
        (0.1, {}),
        (0.3, {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "bound": 0.75}),
        (optax.cosine_decay_schedule(0.4, 20), {"bound": 1.0}),
    ],
)
def test_ternary_adam_is_adam_on_clipped_latents_in_float64(dtype, rate, options):
    rng = np.random.default_rng(0)
    param = ternary(rng, (9, 11), dtype)
    grads = [normal(rng, param.shape) + 0.3 for _ in range(25)]
    numbers = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "bound": 1.5, **options}
    optimizer = ternary_adam(rate, **options)
    state, flips = optimizer.init(param), 0
    expected = numpy_adam(param, grads, rate if callable(rate) else lambda _: rate, **numbers)
    for grad, want in zip(grads, expected, strict=True):
        before, (param, state) = param, step(optimizer, grad, state, param)
        np.testing.assert_allclose(state.latents, want, atol=2e-5)
        clear = np.abs(np.abs(want) - 0.5) > 1e-4  # the rest is too near a tie for float32
        np.testing.assert_array_equal(np.asarray(param)[clear], rounded(want)[clear])
        assert clear.mean() > 0.9
        flips += int((np.asarray(param) != np.asarray(before)).sum())
    assert flips > 30
    assert np.abs(want).max() == numbers["bound"]  # the bound was reached


def test_ternary_adam_defaults_are_those_documented():
    rng = np.random.default_rng(1)
    param, grads = ternary(rng, (5, 5)), [normal(rng, (5, 5)) for _ in range(8)]
    explicit = with_latents(optax.adam(0.2, 0.9, 0.999, 1e-8), bound=1.5)
    for got, want in zip(run(ternary_adam(), param, grads), run(explicit, param, grads), strict=True):
        assert_same(got, want)


@st.composite
def problems(draw):
    # Few shapes, as each compiles anew. Quarters are exact in float32, and often ties.
    shape = draw(st.sampled_from([(), (7,), (2, 3)]))
    dtype = draw(st.sampled_from([np.int8, np.float32]))
    param = draw(hnp.arrays(np.int8, shape, elements=st.integers(-1, 1))).astype(dtype)
    quarters = hnp.arrays(np.int8, shape, elements=st.integers(-8, 8))
    return param, [g.astype(np.float32) / 4 for g in draw(st.lists(quarters, min_size=1, max_size=6))]


SGD = with_latents(optax.sgd(1.0), bound=1.25)


@PROPERTY
@given(problems())
def test_sgd_on_latents_is_the_equation_exactly(problem):
    param, grads = problem
    latents = param.astype(np.float64)
    history, state = run(SGD, param, grads)
    for grad, new in zip(grads, history, strict=True):
        latents = np.clip(latents - grad, -1.25, 1.25)
        assert_same(new, rounded(latents).astype(param.dtype))
    assert_same(state.latents, latents.astype(np.float32))


ADAM = ternary_adam(0.4)


@PROPERTY
@given(
    st.sampled_from([np.int8, np.float16, np.float32]),
    hnp.arrays(np.int8, 6, elements=st.integers(-1, 1)),
    hnp.arrays(np.float32, (4, 6), elements=st.floats(width=32)),  # NaN, infinite, denormal and all
)
def test_parameters_stay_ternary_whatever_the_gradients(dtype, param, grads):
    param, state = param.astype(dtype), ADAM.init(param)
    for grad in grads:
        updates, state = jax.jit(ADAM.update)(grad, state, param)
        assert updates.dtype == dtype
        assert np.isin(updates, [-2, -1, 0, 1, 2]).all()
        param = np.asarray(optax.apply_updates(param, updates))
        assert param.dtype == dtype
        assert np.isin(param, [-1, 0, 1]).all()
        np.testing.assert_array_equal(param, np.nan_to_num(rounded(np.asarray(state.latents))))


def test_the_inner_optimizer_sees_float32_gradients_latents_and_extra_arguments():
    seen = {}

    def spy(updates, state, params=None, **extra_args):
        seen.update(grads=updates, params=params, **extra_args)
        return jax.tree.map(lambda g: -g / 4, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: {"start": params}, spy)
    params = {"A": np.array([1, 0, -1], np.int8)}
    optimizer = with_latents(inner)
    state = optimizer.init(params)
    assert_same(state, LatentState({"A": np.float32([1, 0, -1])}, {"start": {"A": np.float32([1, 0, -1])}}))
    for grads in (np.float16([1, -1, 1]), jnp.bfloat16([1, -1, 1])):
        updates, state = optimizer.update({"A": jnp.asarray(grads)}, state, params, value=3.0)
    assert seen["value"] == 3.0
    assert_same(seen["grads"], {"A": np.float32([1, -1, 1])})
    assert_same(seen["params"], {"A": np.float32([0.75, 0.25, -1.25])})
    assert_same(updates, {"A": np.int8([-1, 0, 0])})


def test_parameters_changed_from_outside_return_to_what_the_latents_say():
    param = np.array([1, 0, -1, 0], np.int8)
    state = SGD.init(param)
    new, _ = step(SGD, np.float32([0, 0, 0, -1]), state, np.array([-1, 1, 0, -1], np.int8))
    assert_same(new, np.int8([1, 0, -1, 1]))


# --- edges, bad values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_gradient_makes_its_latent_nan_its_value_zero_and_leaves_the_rest(bad):
    rng = np.random.default_rng(2)
    params = {"a": np.ones((3, 4), np.int8), "b": ternary(rng, 5)}
    grads = [{"a": normal(rng, (3, 4)), "b": normal(rng, 5)} for _ in range(3)]
    good, good_state = run(ternary_adam(), params, grads)
    grads[0]["a"][1, 2] = bad
    got, state = run(ternary_adam(), params, grads)
    rest = np.ones((3, 4), bool)
    rest[1, 2] = False
    np.testing.assert_array_equal(np.isnan(state.latents["a"]), ~rest)
    assert_same(state.latents["b"], good_state.latents["b"])
    for new, want in zip(got, good, strict=True):
        assert_same(new["a"], np.where(rest, want["a"], 0).astype(np.int8))
        assert_same(new["b"], want["b"])

    finite = with_latents(optax.apply_if_finite(optax.adam(0.2), 5))
    assert_same(run(finite, params, grads)[0], [params, *run(finite, params, grads[1:])[0]])


def test_nones_masked_nodes_and_empty_arrays_pass_through():
    rng = np.random.default_rng(3)
    array, grad = ternary(rng, (6, 6)), normal(rng, (6, 6))
    empty = np.zeros((0, 4), np.int8)
    params = {"a": array, "none": None, "masked": optax.MaskedNode(), "empty": empty, "frozen": array}
    grads = {**params, "a": grad, "empty": empty.astype(np.float32), "frozen": None}
    optimizer = with_latents(optax.adamw(0.6, weight_decay=0.5))
    state = optimizer.init(params)
    new, new_state = step(optimizer, grads, state, params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert_same(new_state.latents["frozen"], state.latents["frozen"])
    assert not np.array_equal(new["a"], array)
    assert_same({**new, "a": array}, params)
    # A gradient where there is no parameter is nobody's.
    step(optimizer, {**grads, "none": grad}, state, params)


@pytest.mark.parametrize("tree", [{}, [], ()])
def test_empty_trees(tree):
    new, state = step(ternary_adam(), tree, ternary_adam().init(tree), tree)
    assert new == tree
    assert state.latents == tree


@pytest.mark.parametrize("init", [ADAM.init, jax.jit(ADAM.init)])
def test_parameters_and_state_share_no_memory(init):
    params = {"A": jnp.ones((3, 2), jnp.float32)}
    state = init(params)
    both = jax.jit(lambda state, params: step(ADAM, params, state, params), donate_argnums=(0, 1))
    both(state, params)  # refused by JAX if a buffer is donated twice
    assert params["A"].is_deleted()


# --- as an optax transformation --------------------------------------------------------------------------


def test_a_stack_is_its_layers_as_separate_tensors():
    rng = np.random.default_rng(4)
    stack, grads = ternary(rng, (3, 8, 4)), [normal(rng, (3, 8, 4)) for _ in range(10)]
    stacked, _ = run(ternary_adam(0.2), stack, grads)
    layers, _ = run(ternary_adam(0.2), list(stack), [list(g) for g in grads])
    for got, want in zip(stacked, layers, strict=True):
        assert_same(list(np.asarray(got)), want)


def test_jit_is_eager_and_scan_is_the_loop():
    rng = np.random.default_rng(5)
    params = {"a": ternary(rng, (8, 6)), "b": ternary(rng, (3, 7), np.float32)}
    grads = [{k: normal(rng, p.shape) for k, p in params.items()} for _ in range(8)]
    optimizer = ternary_adam(0.3)
    looped, state = run(optimizer, params, grads)

    eager, eager_state = params, optimizer.init(params)
    for g in grads:
        updates, eager_state = optimizer.update(g, eager_state, eager)
        eager = optax.apply_updates(eager, updates)
    (scanned, scanned_state), _ = jax.lax.scan(
        lambda carry, g: (step(optimizer, g, carry[1], carry[0]), None),
        (params, optimizer.init(params)),
        jax.tree.map(lambda *g: jnp.stack(g), *grads),
    )
    for new, new_state in ((eager, eager_state), (scanned, scanned_state)):
        assert_same(new, looped[-1])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), new_state, state)


def test_a_run_resumed_from_its_saved_state_is_the_run():
    rng = np.random.default_rng(6)
    params = {"a": ternary(rng, (8, 6)), "b": ternary(rng, (3, 7), np.float32)}
    grads = [{k: normal(rng, p.shape) for k, p in params.items()} for _ in range(10)]
    optimizer = ternary_adam(optax.cosine_decay_schedule(0.4, 10))
    whole, whole_state = run(optimizer, params, grads)
    first, state = run(optimizer, params, grads[:4])
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(optimizer.init(params)), saved)
    second, state = run(optimizer, first[-1], grads[4:], restored)
    assert_same(second, whole[4:])
    assert_same(state, whole_state)


def test_chain_masked_and_multi_transform():
    rng = np.random.default_rng(7)
    params = {"lora": ternary(rng, (10, 10)), "bias": jnp.ones(3)}
    grads = [{"lora": normal(rng, (10, 10)), "bias": jnp.ones(3)} for _ in range(5)]
    alone, _ = run(ternary_adam(0.3), params["lora"], [g["lora"] for g in grads])
    labels = {"lora": "ternary", "bias": "dense"}
    split = optax.multi_transform({"ternary": ternary_adam(0.3), "dense": optax.sgd(0.5)}, labels)
    masked = optax.chain(
        optax.masked(ternary_adam(0.3), {"lora": True, "bias": False}),
        optax.masked(optax.scale(-0.5), {"lora": False, "bias": True}),
    )
    for optimizer in (split, masked):
        got, _ = run(optimizer, params, grads)
        assert_same([p["lora"] for p in got], alone)
        np.testing.assert_allclose(got[-1]["bias"], 1 - 5 * 0.5)

    clipped, _ = run(optax.chain(optax.clip_by_global_norm(1.0), SGD), params["lora"], [g["lora"] for g in grads])
    scaled, _ = run(SGD, params["lora"], [g["lora"] / np.linalg.norm(g["lora"]) for g in grads])
    assert_same(clipped, scaled)
    assert not np.array_equal(clipped[-1], run(SGD, params["lora"], [g["lora"] for g in grads])[0][-1])


def test_multi_steps_is_one_step_with_the_mean_gradient():
    rng = np.random.default_rng(8)
    param = ternary(rng, (6, 6))
    grads = rng.integers(-8, 8, (3, 2, 6, 6)).astype(np.float32)  # their mean is exact
    wrapped, _ = run(optax.MultiSteps(ternary_adam(0.3), every_k_schedule=2), param, list(grads.reshape(6, 6, 6)))
    assert_same(wrapped[1::2], run(ternary_adam(0.3), param, list(grads.mean(axis=1)))[0])
    assert_same(wrapped[0], jnp.asarray(param))


def test_inject_hyperparams_changes_no_result_and_its_numbers_can_be_set():
    rng = np.random.default_rng(9)
    param, grads = ternary(rng, (10, 8)), [normal(rng, (10, 8)) for _ in range(6)]
    inject = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    for rate in (0.3, optax.cosine_decay_schedule(0.45, 6)):
        optimizer = inject(ternary_adam)(rate, bound=1.0)
        assert_same(run(optimizer, param, grads)[0], run(ternary_adam(rate, bound=1.0), param, grads)[0])
    state = optimizer.init(param)
    assert set(state.hyperparams) == {"learning_rate", "b1", "b2", "eps", "bound"}
    state.hyperparams["bound"] = jnp.asarray(0.25)
    assert_same(step(optimizer, grads[0], state, param)[0], jnp.zeros_like(param))
    inner = inject(with_latents)(optax.sgd(1.0), bound=1.25)
    assert_same(run(inner, param, grads)[0], run(SGD, param, grads)[0])


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float16, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("grad_dtype", [np.float16, jnp.bfloat16, np.float32])
def test_updates_have_the_type_of_the_parameters_and_the_state_is_float32(dtype, grad_dtype):
    param, grad = jnp.zeros((9, 9), dtype), jnp.ones((9, 9), grad_dtype)
    state = ADAM.init(param)
    updates, new_state = jax.eval_shape(ADAM.update, grad, state, param)
    assert updates.dtype == dtype
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.shape == param.shape) == 3 * 4 * param.size
    for leaf, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
        assert (leaf.shape, leaf.dtype) == (new.shape, new.dtype)


def test_the_state_can_be_mapped():
    state = ADAM.init({"a": np.zeros((3, 3), np.int8)})
    mapped = optax.tree.map_params(ADAM, lambda m: m + 1, state)
    assert_same(mapped.latents, {"a": np.ones((3, 3), np.float32)})
    assert_same(optax.tree.get(mapped, "nu"), {"a": np.ones((3, 3), np.float32)})
    assert optax.tree.get(mapped, "count") == 0


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharding_is_that_of_the_parameters(axis_type):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType[axis_type],))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    rng = np.random.default_rng(10)
    param, grad = (jax.device_put(array, sharding) for array in (ternary(rng, (16, 8)), normal(rng, (16, 8))))
    new, state = step(ADAM, grad, ADAM.init(param), param)
    for array in (new, state.latents, ADAM.init(param).latents):
        assert array.sharding.is_equivalent_to(sharding, 2)


# --- what it is for --------------------------------------------------------------------------------------


def test_a_value_flips_when_enough_steps_agree():
    votes = np.float32([[-1, -1, 1], [-1, 1, 1], [-1, -1, 1], [-1, 1, 1]])
    got, _ = run(ternary_adam(0.15), np.zeros(3, np.int8), list(votes))
    assert [p.tolist() for p in got] == [[0, 0, 0]] * 3 + [[1, 0, -1]]


# --- errors and documentation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bound": 0.5}, "bound is 0.5"),
        ({"bound": float("nan")}, "bound is nan"),
        ({"bound": -1}, "bound is -1"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"b1": 1.0}, "b1 is 1.0"),
        ({"b2": -0.5}, "b2 is -0.5"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ternary_adam(**arguments)


def test_init_and_update_name_what_does_not_fit():
    params = {"A": np.zeros((2, 3), np.int8)}
    state = ADAM.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        ADAM.update({"A": np.ones((2, 3), np.float32)}, state)
    with pytest.raises(ValueError, match=r"\['A'\] has shape \(3, 2\), expected \(2, 3\)"):
        ADAM.update({"A": np.ones((3, 2), np.float32)}, state, params)
    with pytest.raises(ValueError, match=r"\['A'\] is int8.*float copy"):
        ADAM.update(params, state, params)
    for dtype in (np.uint8, np.bool_, np.complex64):
        with pytest.raises(ValueError, match=r"\['A'\] is .*expected a float or signed integer"):
            ADAM.init({"A": np.zeros(3, dtype)})


def test_documented_examples():
    results = doctest.testmod(latent)
    assert results.attempted > 0
    assert results.failed == 0
