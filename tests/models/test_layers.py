"""Linear layers of one x: together they give what each gives, and decoding asks for them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lotaqaf_jax.models.layers as layers
from lotaqaf_jax.kernels import LowRank, TernaryAdapter
from lotaqaf_jax.models import Decoder, QuantSpec, add_adapters, add_lora
from lotaqaf_jax.models.layers import Adapter, Linear, products
from lotaqaf_jax.models.spec import LinearSpec
from tests.models.tiny import fill, quantized_decoder, tokens

BASE = QuantSpec(4, 16)


def linear(width: int, quant: QuantSpec | None = BASE, bias: bool = True, adapter: bool = False) -> Linear:
    """A stack of three layers of 32 inputs with random numbers."""
    made = Linear(LinearSpec(32, width, bias, quant), (3,))
    rng = np.random.default_rng(width)
    if quant is None:
        made.weight.set_value(jnp.asarray(rng.normal(size=(3, width, 32)), jnp.float16))
    else:
        fill(made, quant, rng, 3)
    if made.bias is not None:
        made.bias.set_value(jnp.asarray(rng.normal(size=(3, width)), jnp.float16))
    if adapter:
        a, b = (jnp.asarray(rng.integers(-1, 2, shape), jnp.int8) for shape in ((3, 32, 4), (3, 4, width)))
        made.set_adapters(TernaryAdapter(a, b, 1.0, "reference", jnp.dtype(jnp.float32)))
    return made


def with_lora(made: Linear) -> Linear:
    """The same layers with LoRA beside them."""
    rng = np.random.default_rng(7)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 32, 4), (3, 4, made.shape[1])))
    made.adapter = Adapter(LowRank(a, b, 8.0))
    return made


@pytest.mark.parametrize(
    "others",
    [
        lambda: [linear(8), linear(8)],
        lambda: [linear(8, bias=False), linear(24)],
        lambda: [linear(8, QuantSpec(8, 16)), linear(8, QuantSpec(4, 16, act_order=True))],
        lambda: [linear(8, None), linear(8)],
        lambda: [linear(8, adapter=True)],
        lambda: [with_lora(linear(8)), with_lora(linear(24, None)), linear(16)],
    ],
    ids=["alike", "one bias", "other quantisation", "dense", "adapter", "lora"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_each_layer(others: Callable[[], list[Linear]], dtype: Any) -> None:
    linears = [linear(32), *others()]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32)), dtype)
    for index in (0, 2):
        layer = jnp.asarray(index, jnp.int32)
        for one, y in zip(linears, products(x, linears, layer), strict=True):
            assert y.dtype == dtype
            np.testing.assert_array_equal(y, one(x, layer))


def test_decoding_reads_q_k_and_v_together_and_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []
    many = layers.packed_matmul_many

    def record(x: jax.Array, weights: Sequence[Any], *rest: Any, **names: Any) -> tuple[jax.Array, ...]:
        made.append([w.shape[1] for w in weights])
        return many(x, weights, *rest, **names)

    monkeypatch.setattr(layers, "packed_matmul_many", record)

    def decode(model: Decoder) -> None:
        positions, valid = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 4), bool)
        jax.eval_shape(
            lambda ids: model.cached_hidden_states(ids, positions, model.empty_cache(2, 4), 0, valid), tokens(2, 1)
        )

    model = quantized_decoder()
    decode(model)
    assert made == [[32, 16, 16], [32], [48, 48], [32]]
    made.clear()
    decode(add_adapters(model, rank=4, omega=1, target_modules=("k_proj", "down_proj")))
    assert made == [[32], [16], [32], [48, 48]]
    made.clear()
    decode(add_lora(model, rank=4))
    assert made == [[32, 16, 16], [32], [48, 48], [32]], "LoRA's product is beside the packed one"
