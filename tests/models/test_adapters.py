"""Adapters on a whole model: they start as nothing, and merging them changes no bit of the logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lotaqaf_jax
from lotaqaf_jax.errors import AdapterError, ConfigError
from lotaqaf_jax.models import (
    TARGET_MODULES,
    Decoder,
    DecoderSpec,
    QuantSpec,
    adapted_linears,
    add_adapters,
    dense_spec,
    linears,
    load_pretrained,
    merge,
    moved_shares,
)
from tests.models.tiny import CONFIG, quantized_decoder, set_random_adapters, tokens

# All projections of one size, so that what is compiled for one serves all.
SQUARE = dataclasses.replace(CONFIG, intermediate_size=32, num_key_value_heads=4)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return quantized_decoder(SQUARE)


def adapted(model: Decoder, kind: Any = jnp.int8, **settings: Any) -> Decoder:
    model = add_adapters(model, **settings)
    set_random_adapters(model, kind=kind)
    return model


def integers(model: Decoder) -> dict[str, np.ndarray]:
    """Unpacked integers of every module by name."""
    return {
        name: np.asarray(rows)
        for names, linear in linears(model)
        if linear.is_quantized
        for name, rows in zip(names, linear.packed.integers(), strict=True)
    }


def test_fresh_adapters_change_no_bit(model: Decoder) -> None:
    fresh = add_adapters(model, rank=8)
    assert [a.rank for _, _, a in adapted_linears(fresh)] == [8] * 7
    np.testing.assert_array_equal(fresh(tokens()), model(tokens()))
    assert not list(adapted_linears(model)), "the model that was given stays as it was"
    assert set(moved_shares(fresh)) == set(integers(model))
    assert all(share == 0 for share in moved_shares(fresh).values())


# (width and groups, settings, type of the computation)
MERGES: tuple[tuple[QuantSpec, dict[str, Any], Any], ...] = (
    (QuantSpec(4, 16), {"rank": 6, "omega": 1.7, "offset": "reference", "offset_dtype": jnp.float32}, jnp.float32),
    (QuantSpec(3, 32), {"rank": 5, "omega": 2, "offset": "paper", "offset_dtype": jnp.bfloat16}, jnp.float32),
    (QuantSpec(2, 16, act_order=True), {"rank": 6, "omega": 2.5, "offset_dtype": jnp.float16}, jnp.bfloat16),
    (QuantSpec(8, -1), {"rank": 6, "omega": 1.1, "offset": "none"}, jnp.float32),
)


@pytest.mark.parametrize(("quant", "settings", "dtype"), MERGES, ids=lambda value: getattr(value, "bits", None))
def test_merging_changes_no_bit_of_the_logits(quant: QuantSpec, settings: dict[str, Any], dtype: Any) -> None:
    base = quantized_decoder(SQUARE, quant, dtype=dtype)
    model = adapted(base, **settings)
    merged = merge(model)
    np.testing.assert_array_equal(merged(tokens()), model(tokens()))

    shares = moved_shares(model)
    before, after = integers(base), integers(merged)
    for name, rows in before.items():
        step = after[name] - rows
        assert np.abs(step).max() == 1, name
        np.testing.assert_allclose(shares[name], np.abs(step).mean(), rtol=1e-6, err_msg=name)
    for (_, ours), (_, theirs) in zip(linears(merged), linears(base), strict=True):
        ours.packed.validate(stacked=1)
        assert ours.adapters is None
        assert (ours.packed.offset is None) == (settings.get("offset") == "none")
        np.testing.assert_array_equal(ours.packed.zeros, theirs.packed.zeros)
        np.testing.assert_array_equal(ours.packed.scales, theirs.packed.scales)


@pytest.mark.parametrize("quant", [QuantSpec(3, 32), QuantSpec(2, 16, act_order=True)], ids=lambda value: value.bits)
def test_merged_words_may_take_the_place_of_the_models_own(quant: QuantSpec) -> None:
    model = adapted(quantized_decoder(SQUARE, quant), rank=6, omega=1.7)
    kept = merge(model)
    scales = [linear.packed.scales for _, linear in linears(model)]
    old = [linear.packed.qweight for _, linear in linears(model)]
    merged = merge(model, donate=True)
    assert all(words.is_deleted() for words in old)
    for (_, one), (_, other), before in zip(linears(merged), linears(kept), scales, strict=True):
        assert one.packed.scales is before
        np.testing.assert_array_equal(one.packed.qweight, other.packed.qweight)
        np.testing.assert_array_equal(one.packed.offset, other.packed.offset)


def test_int8_and_float_adapters_give_the_same_bits(model: Decoder) -> None:
    settings = {"rank": 6, "omega": 1.7}
    one, other = (adapted(model, kind, **settings)(tokens()) for kind in (jnp.int8, jnp.float32))
    np.testing.assert_array_equal(one, other)


def test_an_adapter_depends_on_the_seed_and_its_name_alone(model: Decoder) -> None:
    def drawn(**settings: Any) -> dict[str, np.ndarray]:
        return {
            name: np.asarray(a)
            for names, _, adapter in adapted_linears(add_adapters(model, rank=8, **settings))
            for name, a in zip(names, adapter.a, strict=True)
        }

    everything, some = drawn(), drawn(target_modules=("down_proj", "q_proj"))
    assert sorted(some) == sorted(name for name in everything if name.endswith(("down_proj", "q_proj")))
    for name, a in some.items():
        np.testing.assert_array_equal(a, everything[name])
    kinds = {a.tobytes() for name, a in everything.items() if "q_proj" in name or "k_proj" in name}
    assert len(kinds) == 6, "no two modules share a draw"
    assert not np.array_equal(drawn(seed=1)["model.layers.0.mlp.up_proj"], everything["model.layers.0.mlp.up_proj"])


def test_omega_defaults_to_the_published_share_of_the_rank(model: Decoder) -> None:
    _, _, adapter = next(adapted_linears(add_adapters(model, rank=8)))
    np.testing.assert_array_equal(adapter.omega, np.full(len(adapter.a), 6.0))
    assert (adapter.offset, adapter.offset_dtype) == ("reference", jnp.float32)


def test_a_projection_in_16_bit_is_passed_over() -> None:
    """Layer 0 with a dense MLP, as ``dynamic`` leaves it; shapes only."""
    packed, dense = (dense_spec(SQUARE, jnp.float16, quant).layers[0] for quant in (QuantSpec(4, 16), None))
    mixed = (*packed[:4], *dense[4:])
    spec = DecoderSpec(layers=(mixed, packed, packed), head=None)
    model = nnx.eval_shape(lambda: add_adapters(Decoder(SQUARE, spec), rank=4))
    names = {name for names, _, _ in adapted_linears(model) for name in names}
    assert len(names) == 4 + 7 + 7
    assert not any(name.startswith("model.layers.0.mlp") for name in names)


def test_a_dense_model_has_nothing_to_adapt() -> None:
    def add() -> Decoder:
        return add_adapters(Decoder(SQUARE, dense_spec(SQUARE)), rank=4, target_modules=("up_proj",))

    with pytest.raises(ConfigError, match="none of up_proj is quantised"):
        nnx.eval_shape(add)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 1}, "rank: found 1, expected at least 2"),
        ({"rank": 8, "omega": 8}, "omega: found 8, expected 0 < omega < rank = 8"),
        ({"rank": 8, "omega": 0.0}, "omega: found 0.0"),
        ({"rank": 8, "offset": "mean"}, "offset: found 'mean'"),
        (
            {"rank": 8, "target_modules": ("q_proj", "query")},
            "target_modules: query not known; expected some of q_proj, ",
        ),
        ({"rank": 8, "target_modules": ()}, "target_modules: none given; expected some of q_proj, "),
        ({"rank": 8, "offset_dtype": jnp.int8}, "offset_dtype: found int8, expected one of float32, bfloat16, float16"),
        ({"rank": 8, "offset_dtype": "float99"}, "offset_dtype: found 'float99', expected one of"),
    ],
)
def test_settings_out_of_range_are_named(model: Decoder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapters(model, **settings)


def test_adapters_go_on_once_and_not_on_a_merged_model(model: Decoder) -> None:
    once = add_adapters(model, rank=4)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj has adapters already"):
        add_adapters(once, rank=4)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj holds the offset of an earlier merge"):
        add_adapters(merge(once), rank=4)
    with pytest.raises(ConfigError, match="no adapters to merge"):
        merge(model)


def test_without_an_offset_a_merged_model_can_be_adapted_again(model: Decoder) -> None:
    merged = merge(adapted(model, rank=4, omega=1, offset="none"))
    assert len(list(adapted_linears(add_adapters(merged, rank=4)))) == 7


def test_the_names_people_import() -> None:
    assert (lotaqaf_jax.add_adapters, lotaqaf_jax.merge, lotaqaf_jax.load_pretrained) == (
        add_adapters,
        merge,
        load_pretrained,
    )
    assert TARGET_MODULES == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lotaqaf_jax.nothing
