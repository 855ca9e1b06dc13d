"""One training step: the gradient is that of the mean loss, the parameters stay ternary, a NaN has a name."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lotaqaf_jax.data import IGNORE
from lotaqaf_jax.models import Decoder, adapted_linears, adapter_statistics, linears, merge
from lotaqaf_jax.optim import t_signsgd
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.training import TrainState, make_train_step
from lotaqaf_jax.training.loss import summed_loss
from lotaqaf_jax.training.step import nonfinite_tensors, split_model
from tests.training.test_loss import batch_of


def start(model: Decoder, optimizer: optax.GradientTransformation) -> tuple[Any, TrainState, nnx.State]:
    graph, adapters, frozen = split_model(model)
    adapters = jax.tree.map(jnp.copy, adapters)
    return graph, TrainState(adapters, optimizer.init(adapters), jnp.int32(0)), frozen


def arrays(state: nnx.State) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_step_moves_ternary_adapters_and_counts_the_moves(adapted: Decoder) -> None:
    optimizer = t_signsgd(3, stacked_axes=1)
    graph, state, frozen = start(adapted, optimizer)
    before = arrays(state.adapters)
    state, metrics = make_train_step(graph, optimizer)(state, frozen, batch_of(np.random.default_rng(0)))
    after = arrays(state.adapters)
    assert all(array.dtype == np.int8 and set(np.unique(array)) <= {-1, 0, 1} for array in after)
    moved = sum(int(np.abs(new.astype(int) - old).sum()) for new, old in zip(after, before, strict=True))
    assert int(metrics.changed) == moved > 0
    assert int(state.step) == 1
    assert int(metrics.tokens) == 33


@pytest.mark.parametrize("accumulate", [4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(adapted: Decoder, accumulate: int) -> None:
    """Parts with different numbers of targets weigh by their targets, not equally."""
    batch = batch_of(np.random.default_rng(2), rows=4)
    batch["labels"] = batch["labels"].at[0].set(IGNORE)
    optimizer = t_signsgd(3, stacked_axes=1)
    results = []
    for parts in (1, accumulate):
        graph, state, frozen = start(adapted, optimizer)
        results.append(make_train_step(graph, optimizer, accumulate=parts)(state, frozen, batch)[1])
    np.testing.assert_allclose(results[0].loss, results[1].loss, rtol=1e-5)
    np.testing.assert_allclose(results[0].grad_norm, results[1].grad_norm, rtol=1e-4)


def test_gradient_is_that_of_the_mean_loss(adapted: Decoder) -> None:
    optimizer = t_signsgd(3, stacked_axes=1)
    batch = batch_of(np.random.default_rng(3))
    graph, state, frozen = start(adapted, optimizer)
    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.adapters)
    targets = int((batch["labels"] != IGNORE).sum())

    def mean_loss(floats: nnx.State) -> jax.Array:
        return summed_loss(nnx.merge(graph, floats, frozen), batch) / targets

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(floats)
    metrics = make_train_step(graph, optimizer, recompute="none")(state, frozen, batch)[1]
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, optax.global_norm(gradients), rtol=1e-4)


def test_nan_is_traced_to_its_tensor(adapted: Decoder) -> None:
    _, adapters, _ = split_model(adapted)
    squares = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[:1]), adapters)
    assert list(nonfinite_tensors(adapted, squares)) == []
    poisoned = squares["segments"][0]["mlp"]["up_proj"]["adapter"]
    value = poisoned.get_value()
    poisoned.set_value(dataclasses.replace(value, b=value.b.at[1].set(jnp.nan)))
    assert list(nonfinite_tensors(adapted, squares)) == ["model.layers.1.mlp.up_proj.lota_B"]


def test_statistics_agree_with_the_merged_model(adapted: Decoder) -> None:
    rng = np.random.default_rng(4)
    offsets = []
    for _, linear, adapter in adapted_linears(adapted):
        b = jnp.asarray(rng.integers(-1, 2, adapter.b.shape), jnp.int8)
        linear.set_adapters(dataclasses.replace(adapter, b=b))
    moved = integers = 0
    for (_, before), (_, after) in zip(linears(adapted), linears(merge(adapted)), strict=True):
        if before.adapter is None:
            continue
        words = [[w.integers() for w in _layers(linear.packed)] for linear in (before, after)]
        moved += sum(int((one != other).sum()) for one, other in zip(*words, strict=True))
        integers += sum(layer.size for layer in words[0])
        assert after.packed.offset is not None
        offsets.append(np.abs(np.asarray(after.packed.offset)).ravel())
    found = adapter_statistics(adapted).values()
    assert sum(one.moved for one in found) == moved > 0
    assert sum(one.integers for one in found) == integers
    mean = sum(one.mu for one in found) / sum(one.offsets for one in found)
    np.testing.assert_allclose(mean, np.concatenate(offsets).mean(), rtol=1e-5)


def _layers(stack: QuantizedWeight) -> list[QuantizedWeight]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(stack.qweight.shape[0])]
