"""LoRA and QA-LoRA on a whole model: they start as nothing, and compute what their equations say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lotaqaf_jax.errors import AdapterError, ConfigError
from lotaqaf_jax.kernels import LowRank
from lotaqaf_jax.models import (
    Adapter,
    Decoder,
    DecoderSpec,
    QuantSpec,
    adapted_linears,
    adapter_statistics,
    add_lora,
    add_qalora,
    dense_spec,
    linears,
    merge,
)
from lotaqaf_jax.models.layers import Linear
from lotaqaf_jax.models.spec import LinearSpec
from tests.models.tiny import CONFIG, fill, fill_decoder, quantized_decoder, set_random_low_rank, tokens

SQUARE = dataclasses.replace(CONFIG, intermediate_size=32, num_key_value_heads=4)
ADD: dict[str, Callable[..., Decoder]] = {"lora": add_lora, "qalora": add_qalora}


@pytest.fixture(scope="module")
def model() -> Decoder:
    return quantized_decoder(SQUARE, QuantSpec(4, 16, act_order=True))


def mixed() -> Decoder:
    """A decoder whose first layer has a dense MLP, as ``dynamic`` leaves it."""
    quant = QuantSpec(4, 16)
    packed, dense = (dense_spec(SQUARE, jnp.float16, kind).layers[0] for kind in (quant, None))
    model = Decoder(SQUARE, DecoderSpec(layers=((*packed[:4], *dense[4:]), packed), head=None))
    fill_decoder(model, quant)
    return model


@pytest.mark.parametrize("method", ADD)
def test_fresh_adapters_change_no_bit(model: Decoder, method: str) -> None:
    fresh = ADD[method](model, rank=5)
    np.testing.assert_array_equal(fresh(tokens()), model(tokens()))
    assert not list(adapted_linears(model)), "the model that was given stays as it was"


def test_start_is_that_of_peft(model: Decoder) -> None:
    """A uniform in +-1/sqrt(rows of A), which is torch's Kaiming uniform with a = sqrt(5); B zero; both float32."""
    for method, rows in (("lora", 32), ("qalora", 2)):
        for _, _, pair in adapted_linears(ADD[method](model, rank=24)):
            assert pair.a.shape == (3, rows, 24)
            assert pair.a.dtype == pair.b.dtype == jnp.float32
            assert not pair.b.any()
            assert pair.alpha == 48
            bound = rows**-0.5
            a = np.asarray(pair.a)
            assert 0.9 * bound < a.max() <= bound
            assert -bound <= a.min() < -0.9 * bound
            np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.25)


def test_an_adapter_depends_on_the_seed_and_its_name_alone(model: Decoder) -> None:
    def drawn(**settings: Any) -> dict[str, np.ndarray]:
        return {names[0]: np.asarray(pair.a) for names, _, pair in adapted_linears(add_lora(model, 3, **settings))}

    everything, some = drawn(), drawn(target_modules=("down_proj",))
    assert list(some) == ["model.layers.0.mlp.down_proj"]
    np.testing.assert_array_equal(*(one["model.layers.0.mlp.down_proj"] for one in (some, everything)))
    assert len({a.tobytes() for a in everything.values()}) == 7
    assert not np.array_equal(drawn(seed=1)["model.layers.0.mlp.up_proj"], everything["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize("quant", [None, QuantSpec(4, 16)], ids=["dense", "quantised"])
def test_lora_is_its_equation(quant: QuantSpec | None) -> None:
    """In float64: x @ W + bias + alpha/rank * x @ A @ B, for a layer by itself and as one of a stack."""
    rng = np.random.default_rng(0)
    layer = Linear(LinearSpec(32, 24, True, quant), (3,))
    if quant is None:
        layer.weight.set_value(jnp.asarray(rng.normal(size=(3, 24, 32)), jnp.float16))
        matrix = np.asarray(layer.weight.get_value(), np.float64)[1].T
    else:
        fill(layer, quant, rng, 3)
        matrix = np.asarray(jax.tree.map(lambda leaf: leaf[1], layer.packed).dequantize(), np.float64)
    assert layer.bias is not None
    layer.bias.set_value(jnp.asarray(rng.normal(size=(3, 24)), jnp.float16))
    a, b = rng.normal(size=(3, 32, 5)).astype(np.float32), rng.normal(size=(3, 5, 24)).astype(np.float32)
    layer.adapter = Adapter(LowRank(jnp.asarray(a), jnp.asarray(b), 15.0))
    x = rng.normal(size=(2, 4, 32)).astype(np.float32)
    expected = x.astype(np.float64) @ (matrix + 3 * a[1].astype(np.float64) @ b[1])
    expected = expected + np.asarray(layer.bias.get_value(), np.float64)[1]
    graph, state = nnx.split(layer)
    alone = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[1], state))
    for found in (alone(jnp.asarray(x)), layer(jnp.asarray(x), jnp.int32(1))):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    in_16_bit = alone(jnp.asarray(x, jnp.bfloat16))
    assert in_16_bit.dtype == jnp.bfloat16
    np.testing.assert_allclose(in_16_bit.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: jnp.dtype(dtype).name)
def test_merging_qalora_changes_no_bit_of_the_logits(dtype: Any) -> None:
    base = quantized_decoder(SQUARE, QuantSpec(3, 32), dtype=dtype)
    model = add_qalora(base, rank=4, pool="mean", offset_dtype=jnp.float16)
    set_random_low_rank(model, size=2.0)
    assert not np.array_equal(model(tokens()), base(tokens()))
    merged = merge(model)
    np.testing.assert_array_equal(merged(tokens()), model(tokens()))
    for (_, ours), (_, theirs) in zip(linears(merged), linears(base), strict=True):
        ours.packed.validate(stacked=1)
        assert ours.adapters is None
        assert ours.packed.offset is not None
        assert ours.packed.offset.dtype == jnp.float16
        np.testing.assert_array_equal(ours.packed.qweight, theirs.packed.qweight)
    found = adapter_statistics(model).values()
    assert sum(one.moved for one in found) == 0
    mean = sum(one.mu for one in found) / sum(one.offsets for one in found)
    offsets = [np.abs(np.asarray(linear.packed.offset, np.float32)).ravel() for _, linear in linears(merged)]
    np.testing.assert_allclose(mean, np.concatenate(offsets).mean(), rtol=1e-5)


def test_lora_cannot_be_merged_and_moves_nothing(model: Decoder) -> None:
    adapted = add_lora(model, rank=4)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj has LoRA adapters.*save_adapter"):
        merge(adapted)
    assert adapter_statistics(adapted) == {}


def test_layers_in_16_bit_take_lora_alone() -> None:
    model = mixed()
    names = {name for names, _, _ in adapted_linears(add_lora(model, rank=4)) for name in names}
    assert len(names) == 14
    names = {name for names, _, _ in adapted_linears(add_qalora(model, rank=4)) for name in names}
    assert len(names) == 11
    assert not any(name.startswith("model.layers.0.mlp") for name in names)

    def dense() -> Decoder:
        return add_qalora(Decoder(SQUARE, dense_spec(SQUARE)), rank=4)

    with pytest.raises(ConfigError, match="is quantised in this model"):
        nnx.eval_shape(dense)


@pytest.mark.parametrize("method", ADD)
def test_recomputing_changes_no_gradient(method: str) -> None:
    """Packed and dense layers, each way of recomputing, each way of keeping a weight for the backward pass."""
    model = ADD[method](mixed(), rank=3)
    set_random_low_rank(model)
    graph, adapters, frozen = nnx.split(model, Adapter, ...)

    def gradient(recompute: Any) -> Any:
        def loss(adapters: nnx.State) -> jax.Array:
            hidden = nnx.merge(graph, adapters, frozen).hidden_states(tokens(), recompute=recompute)
            return jnp.sin(hidden).sum()

        # Not optimised, which is quicker; the tolerance does not depend on it.
        return jax.jit(jax.grad(loss)).lower(adapters).compile({"xla_backend_optimization_level": 0})(adapters)

    expected = jax.tree.leaves(gradient("none"))
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in expected)
    for recompute in ("products", "block"):
        for one, other in zip(expected, jax.tree.leaves(gradient(recompute)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max(), rtol=0)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"rank": 0}, "rank: found 0, expected at least 1"),
        ("lora", {"rank": 4, "alpha": 0}, "alpha: found 0.0, expected a number above 0"),
        ("lora", {"rank": 4, "target_modules": ("query",)}, "target_modules: query not known"),
        ("qalora", {"rank": 4, "alpha": -1.0}, "alpha: found -1.0"),
        ("qalora", {"rank": 4, "pool": "max"}, "pool: found 'max'"),
        ("qalora", {"rank": 4, "offset_dtype": "int8"}, "offset_dtype: found int8"),
    ],
)
def test_settings_out_of_range_are_named(model: Decoder, method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ADD[method](model, **settings)


def test_adapters_go_on_once(model: Decoder) -> None:
    for method in ADD:
        once = ADD[method](model, rank=2)
        for add in ADD.values():
            with pytest.raises(AdapterError, match="has adapters already"):
                add(once, rank=2)
    with pytest.raises(AdapterError, match="holds the offset of an earlier merge"):
        add_qalora(merge(once), rank=2)
