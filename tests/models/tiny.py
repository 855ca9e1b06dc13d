"""Tiny decoders with random weights, quantised or dense."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lotaqaf_jax.models import Decoder, DecoderConfig, QuantSpec, adapted_linears, dense_spec, linears
from lotaqaf_jax.models.layers import Linear
from tests.weights import Grid, quantized, random_numbers

CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    }
)


def quantized_decoder(
    config: DecoderConfig = CONFIG, quant: QuantSpec | None = None, seed: int = 0, dtype: Any = jnp.float32
) -> Decoder:
    """A decoder whose projections are random integers, and everything else random floats."""
    quant = quant or QuantSpec(4, 16)
    model = Decoder(config, dense_spec(config, jnp.float16, quant), dtype)
    fill_decoder(model, quant, seed)
    return model


def fill_decoder(model: Decoder, quant: QuantSpec, seed: int = 0) -> None:
    """Give packed projections random integers, and everything else random floats."""
    rng = np.random.default_rng(seed)
    for names, linear in linears(model):
        if linear.is_quantized:
            fill(linear, quant, rng, len(names))
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            array = variable.get_value()
            mean = 1.0 if "norm" in str(path[-2]) else 0.0
            variable.set_value(jnp.asarray(rng.normal(mean, 0.3, array.shape), array.dtype))


def fill(linear: Linear, quant: QuantSpec, rng: np.random.Generator, layers: int) -> None:
    """Give a stack of layers random integers, zeros, and scales that keep activations near 1."""
    n_in, n_out = linear.packed.shape
    grid = Grid(quant.bits, n_in, n_out, quant.group_size, quant.act_order)
    stack = []
    for _ in range(layers):
        numbers = random_numbers(rng, grid)
        numbers["scales"] = (numbers["scales"] * (20 / 2**quant.bits / np.sqrt(n_in))).astype(np.float16)
        stack.append(numbers)
    whole = {key: np.stack([numbers[key] for numbers in stack]) for key in stack[0]}
    linear.weight.set_value(quantized(whole, grid))


def set_random_adapters(model: Decoder, seed: int = 0, kind: Any = jnp.int8) -> None:
    """Replace the adapters of ``model`` by random ternary ones, A and B both, of type ``kind``."""
    rng = np.random.default_rng(seed)
    for _, linear, pair in adapted_linears(model):
        a, b = (jnp.asarray(rng.integers(-1, 2, leaf.shape), kind) for leaf in (pair.a, pair.b))
        linear.set_adapters(dataclasses.replace(pair, a=a, b=b))


def set_random_low_rank(model: Decoder, seed: int = 0, size: float = 0.05) -> None:
    """Replace A and B of LoRA's or QA-LoRA's adapters by normal draws, B of deviation ``size``."""
    rng = np.random.default_rng(seed)
    for _, linear, pair in adapted_linears(model):
        a = jnp.asarray(rng.normal(size=pair.a.shape), jnp.float32)
        b = jnp.asarray(size * rng.normal(size=pair.b.shape), jnp.float32)
        linear.set_adapters(dataclasses.replace(pair, a=a, b=b))


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> jax.Array:
    """Random token ids of the tiny vocabulary."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length)), jnp.int32)
