"""Sizes of the published models of both families, for planning memory and for models trained from scratch.

A checkpoint brings its own config.json, which is what loading reads. The GPTQ files of Qwen2.5-72B differ from the
preset: their MLP is padded with zeros to 29696.
"""

from __future__ import annotations

from typing import Any

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models.config import DecoderConfig

__all__ = ["PRESETS", "preset"]


def _qwen(vocab: int, hidden: int, middle: int, layers: int, heads: int, kv_heads: int, tied: bool) -> DecoderConfig:
    return DecoderConfig.from_hf(
        {
            "model_type": "qwen2",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": middle,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": tied,
        }
    )


def _llama(
    hidden: int, middle: int, layers: int, heads: int, head_dim: int, tied: bool, factor: float
) -> DecoderConfig:
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return DecoderConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": hidden,
            "intermediate_size": middle,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": head_dim,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": scaling,
            "tie_word_embeddings": tied,
        }
    )


# Source: the config.json that each model's authors published (of the instruction-tuned model, for Qwen2.5).
PRESETS: dict[str, DecoderConfig] = {
    "qwen2.5-0.5b": _qwen(151936, 896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen(151936, 1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _qwen(151936, 2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7b": _qwen(152064, 3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-14b": _qwen(152064, 5120, 13824, 48, 40, 8, tied=False),
    "qwen2.5-32b": _qwen(152064, 5120, 27648, 64, 40, 8, tied=False),
    "qwen2.5-72b": _qwen(152064, 8192, 29568, 80, 64, 8, tied=False),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 64, tied=True, factor=32.0),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 128, tied=True, factor=32.0),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 128, tied=False, factor=8.0),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 128, tied=False, factor=8.0),
    "llama-3.3-70b": _llama(8192, 28672, 80, 64, 128, tied=False, factor=8.0),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 128, tied=False, factor=8.0),
}


def preset(name: str) -> DecoderConfig:
    """The config of a published model.

    Args:
        name: a key of :data:`PRESETS`, such as ``qwen2.5-14b``, in any case; a trailing ``-gptq``, as in the names of
            :data:`lotaqaf_jax.models.registry.KNOWN_MODELS`, is ignored.

    Raises:
        ConfigError: an unknown name; lists the known ones.
    """
    found = PRESETS.get(name.lower().removesuffix("-gptq"))
    if found is None:
        raise ConfigError(f"{name}: not a known model size; expected one of: {', '.join(PRESETS)}.")
    return found
