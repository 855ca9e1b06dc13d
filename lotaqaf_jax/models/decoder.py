"""One decoder for Llama and Qwen2: attention and MLP blocks, one scan for every run of layers that look alike."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lotaqaf_jax.kernels.attention import causal_attention
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.layers import Embed, Linear, RMSNorm, wide_logits
from lotaqaf_jax.models.rope import apply_rope, rope_angles
from lotaqaf_jax.models.spec import DecoderSpec, LinearSpec

__all__ = ["Attention", "Block", "Decoder", "Mlp", "attention_mask"]


def attention_mask(segment_ids: jax.Array) -> jax.Array:
    """Which token may attend to which, by segment; causality is applied apart from it.

    Args:
        segment_ids: (batch, length) int32.

    Returns:
        (batch, 1, length, length) bool, True where query and key are of one segment.
    """
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary embedding."""

    def __init__(self, config: DecoderConfig, linears: dict[str, LinearSpec], stack: tuple[int, ...] = ()) -> None:
        self.q_proj = Linear(linears["self_attn.q_proj"], stack)
        self.k_proj = Linear(linears["self_attn.k_proj"], stack)
        self.v_proj = Linear(linears["self_attn.v_proj"], stack)
        self.o_proj = Linear(linears["self_attn.o_proj"], stack)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array | None) -> jax.Array:
        """(batch, length, hidden) -> (batch, length, hidden).

            softmax(rope(q) rope(k)^T / sqrt(head_dim) + mask) v, every kv head shared by heads/kv_heads queries

        Args:
            x: (batch, length, hidden).
            rope: cosine and sine, (batch, length, 1, head_dim/2).
            mask: (batch, 1, length, length) bool, or None for causality alone.
        """
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        mixed = causal_attention(q, k, v, mask)
        return self.o_proj(mixed.reshape(batch, length, self.heads * self.head_dim))


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, linears: dict[str, LinearSpec], stack: tuple[int, ...] = ()) -> None:
        self.gate_proj = Linear(linears["mlp.gate_proj"], stack)
        self.up_proj = Linear(linears["mlp.up_proj"], stack)
        self.down_proj = Linear(linears["mlp.down_proj"], stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., hidden) -> (..., hidden)."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then + mlp(norm(.)). Attribute names are those of Hugging Face."""

    def __init__(
        self,
        config: DecoderConfig,
        linears: dict[str, LinearSpec],
        norm_dtype: Any,
        stack: tuple[int, ...] = (),
    ) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, norm_dtype, stack)
        self.self_attn = Attention(config, linears, stack)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, norm_dtype, stack)
        self.mlp = Mlp(linears, stack)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array | None) -> jax.Array:
        """(batch, length, hidden) -> (batch, length, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))

    def linear(self, path: str) -> Linear:
        """The projection at ``path``, one of :data:`lotaqaf_jax.models.spec.PROJECTIONS`."""
        part, name = path.split(".")
        return getattr(getattr(self, part), name)


class Decoder(nnx.Module):
    """A Llama or Qwen2 language model.

    Attributes:
        config: sizes and constants.
        spec: how each weight is held.
        segments: one :class:`Block` for each run of layers that look alike (``spec.runs()``); its arrays carry a
            leading axis of the run's length.
        lm_head: Linear, or None when the embedding is the head.
        dtype: the type that activations and dequantised weights are computed in.

    Built with zeros; :func:`lotaqaf_jax.models.init_decoder` and :func:`lotaqaf_jax.load_pretrained` fill it.
    """

    def __init__(self, config: DecoderConfig, spec: DecoderSpec, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.spec = spec
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, spec.embed_dtype)
        self.segments = nnx.List(
            [Block(config, dict(spec.layers[start]), spec.norm_dtype, (count,)) for start, count in spec.runs()]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, spec.norm_dtype)
        self.lm_head = nnx.data(None if spec.head is None else Linear(spec.head))

    def hidden_states(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array:
        """The last layer's output after its norm, (batch, length, hidden); arguments as :meth:`__call__`.

        ``remat`` recomputes every block in the backward pass rather than keep what it computed.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        rope = rope_angles(positions, self.config)
        mask = None if segment_ids is None else attention_mask(segment_ids)
        x = self.embed_tokens(input_ids, self.dtype)
        for segment in self.segments:
            graph, stacked = nnx.split(segment)

            def block(x: jax.Array, layer: nnx.State, graph: nnx.GraphDef = graph) -> tuple[jax.Array, None]:
                return nnx.merge(graph, layer)(x, rope, mask), None

            x, _ = jax.lax.scan(jax.checkpoint(block) if remat else block, x, stacked)
        return self.norm(x)

    def head(self, hidden: jax.Array) -> jax.Array:
        """(..., hidden) -> logits (..., vocab) float32."""
        if self.lm_head is None:
            return self.embed_tokens.attend(hidden)
        if self.lm_head.is_quantized:
            return self.lm_head(hidden).astype(jnp.float32)
        return wide_logits(hidden, self.lm_head.weight.get_value().astype(hidden.dtype))

    def __call__(
        self, input_ids: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Next-token logits.

        Args:
            input_ids: (batch, length) int32.
            positions: (batch, length) int32, or None for 0, 1, 2, ...
            segment_ids: (batch, length) int32; a token attends only to earlier tokens of its own segment. None means
                one segment a row.

        Returns:
            (batch, length, vocab) float32.
        """
        return _logits(*nnx.split(self), input_ids, positions, segment_ids)


# Compiled once for a structure of model and batch, so that plain calls do not trace and compile the scan every time.
@functools.partial(jax.jit, static_argnums=0)
def _logits(
    graph: nnx.GraphDef,
    state: nnx.State,
    input_ids: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    model = nnx.merge(graph, state)
    return model.head(model.hidden_states(input_ids, positions, segment_ids))
