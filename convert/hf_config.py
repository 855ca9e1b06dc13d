"""``config.json`` of a decoder: the keys that transformers reads, derived from the model."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from convert.tensors import named_linears
from lotaqaf_jax import __version__
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, DecoderConfig
from lotaqaf_jax.quant.config import QuantizationConfig

__all__ = ["WRITER", "complete_config", "model_config", "quantization_config", "writers"]

WRITER = f"lotaqaf_jax:{__version__}"
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def model_config(config: DecoderConfig, dtype: Any) -> dict[str, Any]:
    """The config.json of a decoder without its quantisation; the inverse of :meth:`DecoderConfig.from_hf`.

    Args:
        config: the decoder.
        dtype: the type its floats are stored in, which transformers loads them in.
    """
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    written: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "attention_dropout": 0.0,
        "dtype": jnp.dtype(dtype).name,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.model_type == "llama":
        written |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    else:
        written |= {"use_sliding_window": False}
    if config.model_type == "llama" or config.head_dim * config.num_attention_heads != config.hidden_size:
        written["head_dim"] = config.head_dim
    return written


def writers(checkpoint_format: str, sym: bool) -> list[str]:
    """``meta.quantizer`` of a new GPTQ folder.

    Older writers corrupted asymmetric zero points in v1, so that GPTQModel reads those from writers it knows alone, on
    whose list "gptqmodel" of version 0.9.0 stands for the convention that is kept here too.
    """
    return [WRITER, "gptqmodel:0.9.0"] if checkpoint_format == "gptq" and not sym else [WRITER]


def quantization_config(model: Decoder) -> dict[str, Any] | None:
    """The ``quantization_config`` that describes the packed weights of ``model``, or None if it has none.

    Width and group size are those of most modules; the others are named in ``dynamic``, those in 16 bit with ``-:``.
    The format is that of the weights.

    Raises:
        ConfigError: weights of both formats.
    """
    packed = {name: linear.packed for name, linear, _ in named_linears(model) if linear.is_quantized}
    if not packed:
        return None
    kinds = {name: (weight.bits, weight.group_size) for name, weight in packed.items()}
    (bits, group_size), _ = collections.Counter(kinds.values()).most_common(1)[0]
    formats = {weight.checkpoint_format for weight in packed.values()}
    if len(formats) > 1:
        raise ConfigError(f"the model mixes the formats {sorted(formats)}; one checkpoint has one. Load one of them.")
    form = formats.pop()
    sym = all(bool(jnp.all(weight.zeros == 2 ** (weight.bits - 1))) for weight in packed.values())
    dynamic: dict[str, dict[str, int]] = {}
    for name, linear, _ in named_linears(model):
        pattern = f"^{re.escape(name)}$"
        if not linear.is_quantized:
            if name != "lm_head":
                dynamic[f"-:{pattern}"] = {}
        elif kinds[name] != (bits, group_size):
            dynamic[f"+:{pattern}"] = {"bits": kinds[name][0], "group_size": kinds[name][1]}
    config: dict[str, Any] = {
        "bits": bits,
        "checkpoint_format": form,
        "desc_act": any(weight.g_idx is not None for weight in packed.values()),
        "group_size": group_size,
        "lm_head": "lm_head" in packed,
        "meta": {"quantizer": writers(form, sym)},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": sym,
    }
    if dynamic:
        config["dynamic"] = dynamic
    return config


def complete_config(model: Decoder, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A whole config.json: ``given`` as it is, and what it does not say from the model.

    Args:
        model: the decoder.
        given: keys of config.json, such as a base's config, or the ids of special tokens.

    Raises:
        ConfigError: ``given`` contradicts the model.
    """
    written = dict(given or {})
    dtype = model.embed_tokens.weight.get_value().dtype
    spelled = {"dtype": ("torch_dtype",), "rope_parameters": ("rope_theta", "rope_scaling")}
    for key, value in model_config(model.config, dtype).items():
        if key not in written and not any(other in written for other in spelled.get(key, ())):
            written[key] = value
    said, is_ = vars(DecoderConfig.from_hf(written)), vars(model.config)
    wrong = [f"{key} {said[key]!r} (the model: {is_[key]!r})" for key in is_ if said[key] != is_[key]]
    if wrong:
        raise ConfigError(
            f"config: {', '.join(wrong)} contradicts the model. Leave these keys out, or pass the model's own config."
        )
    own = quantization_config(model)
    if own is None:
        written.pop("quantization_config", None)
    elif "quantization_config" not in written:
        written["quantization_config"] = own
    else:
        _check_quantization(model, QuantizationConfig.from_hf(written["quantization_config"]))
    return written


def _check_quantization(model: Decoder, given: QuantizationConfig) -> None:
    for name, linear, _ in named_linears(model):
        if not linear.is_quantized:
            continue
        weight, said = linear.packed, given.for_module(name)
        found = (weight.bits, weight.group_size, weight.checkpoint_format)
        expected = None if said is None else (said.bits, said.group_size, given.checkpoint_format)
        if found != expected:
            raise ConfigError(
                f"config: quantization_config says {expected} (bits, group_size, checkpoint_format) of {name}, the "
                f"model has {found}. Leave quantization_config out, and it is made from the model."
            )
