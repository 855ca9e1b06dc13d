"""What every weight of a decoder looks like, before any of it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from lotaqaf_jax.models.config import DecoderConfig

__all__ = ["PROJECTIONS", "DecoderSpec", "LinearSpec", "QuantSpec", "dense_spec", "projection_shapes"]

# The projections of one layer, by their path inside it, as Hugging Face names them.
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a weight is quantised: width, rows in a group (-1: one group), act-order, and the file's format."""

    bits: int
    group_size: int
    act_order: bool = False
    checkpoint_format: str = "gptq"


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """One linear layer: its sizes, whether it has a bias, and how its weight is held.

    ``quant`` is None for a dense weight. ``dtype`` is the stored type of the dense weight, or of the scales, and
    ``bias_dtype`` that of the bias.
    """

    in_features: int
    out_features: int
    bias: bool = False
    quant: QuantSpec | None = None
    dtype: Any = jnp.float16
    bias_dtype: Any = jnp.float16


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """Every weight of a decoder: ``layers[i]`` gives the :class:`LinearSpec` of each projection of layer i.

    ``head`` is None when the embedding is used as the output head. Layers that look alike are run in one scan.
    """

    layers: tuple[tuple[tuple[str, LinearSpec], ...], ...]
    head: LinearSpec | None
    embed_dtype: Any = jnp.float16
    norm_dtype: Any = jnp.float16

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first layer, number of layers) of each run of consecutive layers that look alike."""
        start = 0
        for i in range(1, len(self.layers) + 1):
            if i == len(self.layers) or self.layers[i] != self.layers[start]:
                yield start, i - start
                start = i


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[int, int, bool]]:
    """(in, out, bias) of each of :data:`PROJECTIONS`."""
    hidden, middle = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj": (hidden, queries, config.qkv_bias),
        "self_attn.k_proj": (hidden, keys, config.qkv_bias),
        "self_attn.v_proj": (hidden, keys, config.qkv_bias),
        "self_attn.o_proj": (queries, hidden, config.o_bias),
        "mlp.gate_proj": (hidden, middle, config.mlp_bias),
        "mlp.up_proj": (hidden, middle, config.mlp_bias),
        "mlp.down_proj": (middle, hidden, config.mlp_bias),
    }


def dense_spec(config: DecoderConfig, dtype: Any = jnp.float32, quant: QuantSpec | None = None) -> DecoderSpec:
    """The spec of a decoder whose layers all look alike.

    Args:
        config: the decoder.
        dtype: type of every stored float.
        quant: how the projections are quantised, or None for dense ones.
    """
    layer = tuple(
        (name, LinearSpec(n_in, n_out, bias, quant, dtype, dtype))
        for name, (n_in, n_out, bias) in projection_shapes(config).items()
    )
    head = None
    if not config.tie_word_embeddings:
        head = LinearSpec(config.hidden_size, config.vocab_size, dtype=dtype, bias_dtype=dtype)
    return DecoderSpec(layers=(layer,) * config.num_hidden_layers, head=head, embed_dtype=dtype, norm_dtype=dtype)
