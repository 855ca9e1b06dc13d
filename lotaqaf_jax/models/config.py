"""The decoder's configuration, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lotaqaf_jax.errors import ConfigError

__all__ = ["DecoderConfig", "Llama3Rope"]

_MODEL_TYPES = ("llama", "qwen2")


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of ``rope_type: llama3``; its formula is in :mod:`lotaqaf_jax.models.rope`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a Llama or Qwen2 decoder.

    ``qkv_bias``, ``o_bias`` and ``mlp_bias`` say which projections have a bias: q/k/v for Qwen2; all four attention
    projections for Llama with ``attention_bias``.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a ``config.json`` of ``LlamaForCausalLM`` or ``Qwen2ForCausalLM``.

        rope_theta and its scaling are read from ``rope_parameters`` (transformers 5) or from ``rope_theta`` and
        ``rope_scaling`` (older files).

        Args:
            config: the parsed file.

        Raises:
            ConfigError: another architecture, a missing key, or a setting that would compute something else than
                asked: sliding-window attention, an activation other than SiLU, an unknown rope_type.
        """
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise ConfigError(
                f"config.json: model_type is {model_type!r}, expected one of {_MODEL_TYPES}. "
                "Only Llama and Qwen2 decoders are supported."
            )
        _refuse_unsupported(config)
        hidden = _integer(config, "hidden_size")
        heads = _integer(config, "num_attention_heads")
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        if heads % kv_heads:
            raise ConfigError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads.")
        if head_dim % 2:
            raise ConfigError(f"config.json: head_dim is {head_dim}, expected an even number for rotary embedding.")
        attention_bias = bool(config.get("attention_bias", False))
        theta, scaling = _rope(config)
        return cls(
            model_type=model_type,
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(config, "intermediate_size"),
            num_hidden_layers=_integer(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=True if model_type == "qwen2" else attention_bias,
            o_bias=False if model_type == "qwen2" else attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {key} is {value!r}, expected a positive integer.")
    return value


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"config.json: hidden_act is {activation!r}, expected 'silu'.")
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if config.get("use_sliding_window") or layer_types != {"full_attention"}:
        raise ConfigError(
            "config.json asks for sliding-window attention (use_sliding_window or layer_types), which is not "
            "supported. Set use_sliding_window to false if the model is to attend to all earlier tokens."
        )
    if (config.get("pretraining_tp") or 1) != 1:
        raise ConfigError(f"config.json: pretraining_tp is {config['pretraining_tp']}, expected 1.")


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """Return (theta, scaling) from either spelling; ``rope_parameters`` wins where both are given."""
    parameters = config.get("rope_parameters") or {}
    scaling = parameters or config.get("rope_scaling") or {}
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ConfigError(
            f"config.json: rope_type is {kind!r}, expected 'default' or 'llama3'. Remove the scaling if the model is "
            "used within its original context length."
        )
    try:
        return float(theta), Llama3Rope(
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        )
    except KeyError as missing:
        raise ConfigError(f"config.json: rope_type 'llama3' needs {missing.args[0]!r}, which is missing.") from None
