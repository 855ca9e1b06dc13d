"""The table of published sizes: every model builds, and has as many parameters as its authors say."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import KNOWN_MODELS, PRESETS, Decoder, QuantSpec, add_adapters, dense_spec, preset

# Parameters, tied embeddings counted once, as the model pages state them.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}
PLANNED = {"llama-3.1-405b"}  # a size to plan with; no checkpoint of it is known by name


def shapes(name: str, quant: QuantSpec | None) -> Decoder:
    """The decoder without its arrays."""
    config = preset(name)
    return nnx.eval_shape(lambda: Decoder(config, dense_spec(config, jnp.float16, quant), jnp.float32))


def total(model: Decoder) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("name", PRESETS)
def test_every_model_builds_with_as_many_parameters_as_published(name: str) -> None:
    assert total(shapes(name, None)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_model_builds_quantised_with_adapters_and_gives_logits(name: str) -> None:
    """Shapes only; no array is made."""
    group_size = 32 if name == "qwen2.5-72b" else 64
    config = preset(name)
    rank = 32 if name in PLANNED else KNOWN_MODELS[f"{name}-gptq"].rank

    def forward() -> jax.Array:
        model = Decoder(config, dense_spec(config, jnp.float16, QuantSpec(4, group_size)), jnp.bfloat16)
        return add_adapters(model, rank)(jnp.zeros((1, 8), jnp.int32))

    logits = jax.eval_shape(forward)
    assert (logits.shape, logits.dtype) == ((1, 8, config.vocab_size), jnp.float32)


def test_names_are_those_of_the_known_checkpoints() -> None:
    assert {f"{name}-gptq" for name in PRESETS if name not in PLANNED} == set(KNOWN_MODELS)
    assert preset("Qwen2.5-14B-GPTQ") is PRESETS["qwen2.5-14b"]
    with pytest.raises(ConfigError, match=r"qwen2\.5-13b: not a known model size; expected one of: qwen2\.5-0\.5b, "):
        preset("qwen2.5-13b")
