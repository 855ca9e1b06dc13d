"""``config.json`` of Llama and Qwen2 as the hub's files, transformers 4 and transformers 5 write it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import DecoderConfig
from lotaqaf_jax.models.config import Llama3Rope

# The published files, without the keys that say nothing about the computation.
QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def test_qwen() -> None:
    assert DecoderConfig.from_hf(QWEN) == DecoderConfig(
        model_type="qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
    )


def test_llama() -> None:
    assert DecoderConfig.from_hf(LLAMA) == DecoderConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_both_spellings_of_rope_mean_the_same() -> None:
    new = without(LLAMA, "rope_theta", "rope_scaling") | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}
    assert DecoderConfig.from_hf(new) == DecoderConfig.from_hf(LLAMA)
    plain = without(QWEN, "rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    assert DecoderConfig.from_hf(plain) == DecoderConfig.from_hf(QWEN)
    old = without(LLAMA, "rope_scaling") | {"rope_scaling": without(LLAMA3, "rope_type") | {"type": "llama3"}}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(LLAMA)


def test_defaults_are_those_of_the_architecture() -> None:
    bare = without(LLAMA, "rope_theta", "rope_scaling", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    read = DecoderConfig.from_hf(bare)
    assert (read.rope_theta, read.rope_scaling, read.rms_norm_eps) == (10000.0, None, 1e-6)
    assert (read.num_key_value_heads, read.tie_word_embeddings) == (32, False)
    assert DecoderConfig.from_hf(LLAMA | {"head_dim": 64}).head_dim == 64
    assert DecoderConfig.from_hf(LLAMA | {"head_dim": None}).head_dim == 128


def test_which_projections_have_a_bias() -> None:
    attention = DecoderConfig.from_hf(LLAMA | {"attention_bias": True})
    assert (attention.qkv_bias, attention.o_bias, attention.mlp_bias) == (True, True, False)
    mlp = DecoderConfig.from_hf(LLAMA | {"mlp_bias": True})
    assert (mlp.qkv_bias, mlp.o_bias, mlp.mlp_bias) == (False, False, True)
    qwen = DecoderConfig.from_hf(QWEN | {"attention_bias": False, "mlp_bias": True})
    assert (qwen.qkv_bias, qwen.o_bias, qwen.mlp_bias) == (True, False, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected one of ('llama', 'qwen2')"),
        ({"model_type": None}, "model_type is None"),
        ({"use_sliding_window": True}, "asks for sliding-window attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "asks for sliding-window attention"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2, expected 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', expected 'default' or 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": without(LLAMA3, "factor")}, "rope_type 'llama3' needs 'factor', which is missing"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_type 'llama3': factor is None, expected a positive number"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0, expected more than low_freq"),
        ({"rope_scaling": 8}, "rope_scaling is 8, expected an object"),
        ({"rope_theta": "big"}, "rope_theta is 'big', expected a positive number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0, expected a positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, expected a positive number"),
        ({"hidden_size": None}, "hidden_size is None, expected a positive integer"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 key/value heads"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads is '8', expected a positive integer"),
        ({"num_attention_heads": 24, "num_key_value_heads": 8}, "hidden_size 4096 is not a multiple of 24 heads"),
        ({"head_dim": 33}, "head_dim is 33, expected an even number"),
        ({"head_dim": -2}, "head_dim is -2, expected a positive integer"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape("config.json") + ".*" + re.escape(message)):
        DecoderConfig.from_hf(LLAMA | change)


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is None"):
        DecoderConfig.from_hf(without(QWEN, key))
