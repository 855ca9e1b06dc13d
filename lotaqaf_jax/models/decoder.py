"""One decoder for Llama and Qwen2: attention and MLP blocks, one scan for every run of layers that look alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lotaqaf_jax.kernels import AnyAdapter, keep_products
from lotaqaf_jax.kernels.attention import causal_attention
from lotaqaf_jax.kernels.rope import apply_rope
from lotaqaf_jax.models.cache import KVCache
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.layers import Embed, Linear, RMSNorm, products, wide_logits
from lotaqaf_jax.models.rope import rope_angles
from lotaqaf_jax.models.sharding import DecoderSharding
from lotaqaf_jax.models.spec import DecoderSpec, LinearSpec

__all__ = ["Attend", "Attention", "Block", "Decoder", "Mlp", "Recompute", "Rope", "attention_mask", "causal"]

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""How queries meet keys and values: (q, k, v), each (batch, length, heads or kv_heads, head_dim), not yet rotated, ->
(what the queries gather, in the shape of q; whatever is to be kept, such as a cache that has taken in k and v). Rotary
embedding is its part, since decoding does all of it in one kernel."""

Rope = tuple[jax.Array, jax.Array]
"""Cosine and sine of :func:`lotaqaf_jax.models.rope.rope_angles`, each (batch, length, 1, head_dim/2)."""


def attention_mask(segment_ids: jax.Array) -> jax.Array:
    """Which token may attend to which, by segment; causality is applied apart from it.

    Args:
        segment_ids: (batch, length) int32.

    Returns:
        (batch, 1, length, length) bool, True where query and key are of one segment.
    """
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


def causal(rope: Rope, mask: jax.Array | None = None, sharding: DecoderSharding | None = None) -> Attend:
    """Every token attends to itself and to earlier ones where ``mask``, (batch, 1, length, length) bool, allows it.

        softmax(rope(q) rope(k)^T / sqrt(head_dim) + mask) v

    What it keeps is (rope(k), v). ``sharding`` is the decoder's.
    """
    mix = causal_attention if sharding is None else sharding.attention

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k = apply_rope(k, *rope)
        return mix(apply_rope(q, *rope), k, v, mask), (k, v)

    return attend


Recompute = Literal["none", "products", "block"]


def _recomputing(block: Callable[..., Any], recompute: Recompute) -> Callable[..., Any]:
    if recompute == "none":
        return block
    return jax.checkpoint(block, policy=keep_products if recompute == "products" else None)


def _keep_weights(stacked: nnx.State) -> nnx.State:
    """The state of a block whose weights live from its second forward pass to its backward pass."""
    return jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, rebuild=False) if isinstance(leaf, AnyAdapter) else leaf,
        stacked,
        is_leaf=lambda leaf: isinstance(leaf, AnyAdapter),
    )


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, config: DecoderConfig, linears: dict[str, LinearSpec], stack: tuple[int, ...] = ()) -> None:
        self.q_proj = Linear(linears["self_attn.q_proj"], stack)
        self.k_proj = Linear(linears["self_attn.k_proj"], stack)
        self.v_proj = Linear(linears["self_attn.v_proj"], stack)
        self.o_proj = Linear(linears["self_attn.o_proj"], stack)
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim

    def __call__(self, x: jax.Array, attend: Attend, layer: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """(batch, length, hidden) -> what is added to the stream, and what ``attend`` keeps.

            o_proj(attend(q_proj(x), k_proj(x), v_proj(x))), every kv head shared by heads/kv_heads queries

        Args:
            x: (batch, length, hidden).
            attend: rotary embedding, the softmax and its mask: :func:`causal`, or attention over a cache.
            layer: () int32, which layer of stacked arrays; None where they are one layer's.

        Returns:
            (batch, length, hidden), or with ``layer`` parts of it, see :meth:`Linear.summand`; and what is kept.
        """
        batch, length, _ = x.shape
        q, k, v = (
            y.reshape(batch, length, -1, self.head_dim)
            for y in products(x, (self.q_proj, self.k_proj, self.v_proj), layer)
        )
        mixed, kept = attend(q, k, v)
        return self.o_proj.summand(mixed.reshape(batch, length, self.heads * self.head_dim), layer), kept


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, linears: dict[str, LinearSpec], stack: tuple[int, ...] = ()) -> None:
        self.gate_proj = Linear(linears["mlp.gate_proj"], stack)
        self.up_proj = Linear(linears["mlp.up_proj"], stack)
        self.down_proj = Linear(linears["mlp.down_proj"], stack)

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """(..., hidden) -> (..., hidden), or with ``layer`` parts of it, see :meth:`Linear.summand`."""
        gate, up = products(x, (self.gate_proj, self.up_proj), layer)
        return self.down_proj.summand(jax.nn.silu(gate) * up, layer)


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

    def __call__(self, x: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        """(batch, length, hidden) -> (batch, length, hidden), and what ``attend`` keeps; as :class:`Attention`."""
        x, update, kept = self._halves(x, self.input_layernorm(x), attend)
        return x + update, kept

    def attention_half(self, x: jax.Array, attend: Attend) -> jax.Array:
        """x + attention(norm(x)), (batch, length, hidden): the first half of a call, for who looks into a block."""
        return x + self.self_attn(self.input_layernorm(x), attend)[0]

    def mlp_half(self, x: jax.Array) -> jax.Array:
        """x + mlp(norm(x)), (batch, length, hidden): the second half of a call."""
        return x + self.mlp(self.post_attention_layernorm(x))

    def layer_of_stack(
        self, x: jax.Array, normed: jax.Array, attend: Attend, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        """One layer out of stacked arrays, and the first norm of the next, which one kernel adds and computes.

        Args:
            x: (batch, length, hidden).
            normed: x after the layer's first norm.
            attend: as in :class:`Attention`.
            layer: () int32.

        Returns:
            The next layer's x and normed, (batch, length, hidden) both, and what ``attend`` keeps. The normed of a
            layer beyond the last is for nobody.
        """
        x, update, kept = self._halves(x, normed, attend, layer)
        return *self.input_layernorm.after_sum(x, update, layer + 1), kept

    def _halves(
        self, x: jax.Array, normed: jax.Array, attend: Attend, layer: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """x after attention, what the MLP adds to it, and what ``attend`` keeps."""
        mixed, kept = self.self_attn(normed, attend, layer)
        x, normed = self.post_attention_layernorm.after_sum(x, mixed, layer)
        return x, self.mlp(normed, layer), kept

    def linear(self, path: str) -> Linear:
        """The projection at ``path``, one of :data:`lotaqaf_jax.models.spec.PROJECTIONS`."""
        part, name = path.split(".")
        return getattr(getattr(self, part), name)


def logits_of(layer: Embed | Linear, hidden: jax.Array) -> jax.Array:
    """(..., hidden) -> logits (..., vocab) float32, by :attr:`Decoder.output_layer`."""
    if isinstance(layer, Embed):
        return layer.attend(hidden)
    if layer.is_quantized:
        return layer(hidden).astype(jnp.float32)
    return wide_logits(hidden, layer.weight.get_value().astype(hidden.dtype))


class Decoder(nnx.Module):
    """A Llama or Qwen2 language model.

    Attributes:
        config: sizes and constants.
        spec: how each weight is held.
        segments: one :class:`Block` for each run of layers that look alike (``spec.runs()``); its arrays carry a
            leading axis of the run's length.
        lm_head: Linear, or None when the embedding is the head.
        dtype: the type that activations and dequantised weights are computed in.
        sharding: what a mesh does to attention, embedding and head (:mod:`lotaqaf_jax.parallel`); None on one device.

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
        self.sharding: DecoderSharding | None = None

    def hidden_states(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        recompute: Recompute = "none",
    ) -> jax.Array:
        """The last layer's output after its norm, (batch, length, hidden); arguments as :meth:`__call__`.

        ``recompute`` says what the backward pass computes again rather than keeps: "block" everything inside a block
        but its input, "products" everything but the outputs of the linear layers, "none" nothing but the
        dequantised weights, which are never kept. Without a gradient it changes nothing.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        rope = rope_angles(positions, self.config)
        attend = causal(rope, None if segment_ids is None else attention_mask(segment_ids), self.sharding)
        x = self.embed_tokens(input_ids, self.dtype, self.sharding)
        for segment in self.segments:
            graph, stacked = nnx.split(segment)
            if recompute == "block":
                stacked = _keep_weights(stacked)

            def block(x: jax.Array, layer: nnx.State, graph: nnx.GraphDef = graph) -> tuple[jax.Array, None]:
                x = nnx.merge(graph, layer)(x, attend)[0]
                return (x if self.sharding is None else self.sharding.spread(x)), None

            x, _ = jax.lax.scan(_recomputing(block, recompute), x, stacked)
        return self.norm(x)

    def empty_cache(self, batch: int, slots: int) -> tuple[KVCache, ...]:
        """A cache for every segment, of the type the model computes in."""
        config = self.config
        return tuple(
            KVCache.empty(count, batch, config.num_key_value_heads, slots, config.head_dim, self.dtype)
            for _, count in self.spec.runs()
        )

    def cached_hidden_states(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        caches: tuple[KVCache, ...],
        slot: jax.Array | int,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """As :meth:`hidden_states`, with keys and values written to a cache, and read from it.

        The layers are run in a loop over their index with the stacked weights whole, see
        :mod:`lotaqaf_jax.models.layers`.

        Args:
            input_ids: (batch, length) int32.
            positions: (batch, length) int32.
            caches: one for each of ``segments``, from :meth:`empty_cache` or an earlier call.
            slot: () int32; the tokens' keys and values go to the slots slot, ..., slot + length - 1.
            valid: (batch, slots) bool: attend to the slots marked, the new ones among them. None for a prompt: attend
                to the tokens of this call alone, each to itself and earlier ones.

        Returns:
            The last layer's output after its norm, (batch, length, hidden), and the caches.
        """
        rope = rope_angles(positions, self.config)
        marks = None if valid is None else valid.astype(jnp.int8)
        x = self.embed_tokens(input_ids, self.dtype)
        written = []
        for segment, cache in zip(self.segments, caches, strict=True):

            def block(
                layer: jax.Array, carry: tuple[jax.Array, jax.Array, KVCache], segment: Block = segment
            ) -> tuple[jax.Array, jax.Array, KVCache]:
                x, normed, cache = carry

                def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache]:
                    if marks is not None:
                        return cache.attend(q, k, v, rope, marks, layer, slot)
                    mixed, (k, v) = causal(rope)(q, k, v)
                    return mixed, cache.write(k, v, layer, slot)

                return segment.layer_of_stack(x, normed, attend, layer)

            normed = segment.input_layernorm(x, jnp.int32(0))
            x, _, cache = jax.lax.fori_loop(0, cache.keys.shape[0], block, (x, normed, cache))
            written.append(cache)
        return self.norm(x), tuple(written)

    @property
    def output_layer(self) -> Embed | Linear:
        """What makes logits: the output head, or the embedding where it is the head."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def head(self, hidden: jax.Array) -> jax.Array:
        """(..., hidden) -> logits (..., vocab) float32."""
        return logits_of(self.output_layer, hidden)

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
