"""Models of real shapes with random packed weights, for measuring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lotaqaf_jax.kernels import TernaryAdapter
from lotaqaf_jax.models import Decoder, DecoderConfig, QuantSpec, dense_spec
from lotaqaf_jax.models.layers import Linear
from lotaqaf_jax.parallel import shard
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.quant.packing import packed_size
from lotaqaf_jax.quant.weight import group_count


def random_decoder(
    config: DecoderConfig,
    quant: QuantSpec | None,
    *,
    dtype: Any = jnp.bfloat16,
    stored: Any = jnp.float16,
    mesh: Mesh | None = None,
) -> Decoder:
    """A decoder with random words, zero points around the middle, and scales that give weights of deviation 0.02.

    Args:
        config: the decoder.
        quant: how the projections are quantised; None for dense ones.
        dtype: type of activations.
        stored: type of scales and dense weights.
        mesh: of devices to put it on, each part made where it lies; the numbers are the same.
    """
    model = nnx.eval_shape(lambda: Decoder(config, dense_spec(config, stored, quant), dtype))
    if mesh is not None:
        model = shard(model, mesh)
    key = jax.random.key(0)
    for _, module in nnx.iter_modules(model):
        key, draw = jax.random.split(key)
        if isinstance(module, Linear):
            if quant is not None and module.is_quantized:
                module.weight.set_value(_random_words(draw, module.packed))
            else:
                module.weight.set_value(_normal(draw, module.weight.get_value()))
            if module.bias is not None:
                module.bias.set_value(_normal(draw, module.bias.get_value()))
        elif hasattr(module, "eps"):
            like = module.weight.get_value()
            module.weight.set_value(jnp.ones(like.shape, stored, device=like.sharding))
        elif hasattr(module, "attend"):
            module.weight.set_value(_normal(draw, module.weight.get_value()))
    return model


def _normal(key: jax.Array, like: Any) -> jax.Array:
    def draw(key: jax.Array) -> jax.Array:
        return (0.02 * jax.random.normal(key, like.shape, jnp.bfloat16)).astype(like.dtype)

    return jax.jit(draw, out_shardings=like.sharding)(key)


def random_weight(
    key: jax.Array, shape: tuple[int, int], quant: QuantSpec, stored: Any = jnp.float16
) -> QuantizedWeight:
    """One random packed weight, as :func:`random_decoder` fills them."""
    groups = group_count(shape[0], quant.group_size)
    like = QuantizedWeight(
        jax.ShapeDtypeStruct((packed_size(shape[0], quant.bits), shape[1]), jnp.int32),
        jax.ShapeDtypeStruct((groups, shape[1]), stored),
        jax.ShapeDtypeStruct((groups, shape[1]), jnp.uint8),
        None,
        None,
        quant.bits,
        quant.group_size,
        shape,
    )
    return _random_words(key, like)


def random_layer(
    seed: int, shape: tuple[int, int], quant: QuantSpec, rank: int, omega: float
) -> tuple[QuantizedWeight, TernaryAdapter, jax.Array]:
    """A random packed weight (in, out), adapters on it, and a bfloat16 gradient of the adjusted weight."""
    keys = jax.random.split(jax.random.key(seed), 4)
    n_in, n_out = shape
    a = jax.random.randint(keys[1], (n_in, rank), -1, 2, jnp.int8)
    b = jax.random.randint(keys[2], (rank, n_out), -1, 2, jnp.int8)
    adapter = TernaryAdapter(a, b, omega, "reference", jnp.dtype(jnp.float32))
    return random_weight(keys[0], shape, quant), adapter, jax.random.normal(keys[3], shape, jnp.bfloat16)


def _random_words(key: jax.Array, w: QuantizedWeight) -> QuantizedWeight:
    top = 2**w.bits - 1

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        first, second, third = jax.random.split(key, 3)
        words = jax.lax.bitcast_convert_type(jax.random.bits(first, w.qweight.shape, jnp.uint32), jnp.int32)
        spread = 0.02 * (12.0 / ((top + 1) ** 2 - 1)) ** 0.5  # Uniform integers then have the deviation 0.02.
        scales = spread * jax.random.uniform(second, w.scales.shape, minval=0.5, maxval=1.5)
        zeros = jax.random.randint(third, w.zeros.shape, top // 2, top // 2 + 2)
        return words, scales.astype(w.scales.dtype), zeros.astype(jnp.uint8)

    places = tuple(leaf.sharding for leaf in (w.qweight, w.scales, w.zeros))
    words, scales, zeros = jax.jit(draw, out_shardings=places)(key)
    return QuantizedWeight(words, scales, zeros, None, None, w.bits, w.group_size, w.shape, w.checkpoint_format)
