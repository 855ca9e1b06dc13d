"""A beginning that many prompts share, read once: its keys and values, and what follows after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lotaqaf_jax.kernels.rope import apply_rope
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.models.decoder import causal
from lotaqaf_jax.models.rope import rope_angles

__all__ = ["Prefix", "common_prefix", "hidden_after", "read_prefix"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What layers keep of a beginning.

    Attributes:
        keys: for every segment of the model the rotated keys, (layers, 1, slots, kv_heads, head_dim).
        values: likewise.
        length: () int32, how many of the slots hold a token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with; at most one less than the shortest has."""
    # The least and the greatest of them in dictionary order differ first where any two do.
    least, greatest = min(sequences), max(sequences)
    most = min(len(sequence) for sequence in sequences) - 1
    agreed = (i for i, (x, y) in enumerate(zip(least, greatest, strict=False)) if x != y)
    return min(next(agreed, most), most)


def read_prefix(model: Decoder, input_ids: jax.Array, length: jax.Array) -> Prefix:
    """Run a beginning through the model and keep its keys and values.

    Args:
        model: the decoder.
        input_ids: (1, slots) int32, padded on the right.
        length: () int32, tokens that are not padding.
    """
    attend = causal(rope_angles(jnp.arange(input_ids.shape[1])[None], model.config))
    x = model.embed_tokens(input_ids, model.dtype)
    kept = []
    for segment in model.segments:
        graph, stacked = nnx.split(segment)

        def block(
            x: jax.Array, layer: nnx.State, graph: nnx.GraphDef = graph
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            return nnx.merge(graph, layer)(x, attend)

        x, pair = jax.lax.scan(block, x, stacked)
        kept.append(pair)
    return Prefix(tuple(keys for keys, _ in kept), tuple(values for _, values in kept), length)


def hidden_after(model: Decoder, prefix: Prefix, input_ids: jax.Array) -> jax.Array:
    """The last layer's output after its norm, for rows that go on after a prefix.

        Decoder.hidden_states of prefix and row together, without the prefix's positions

    A row attends to the prefix, and to its own tokens up to the place in question.

    Args:
        model: the decoder.
        prefix: from :func:`read_prefix`.
        input_ids: (batch, length) int32, padded on the right.

    Returns:
        (batch, length, hidden).
    """
    batch, length = input_ids.shape
    slots = prefix.keys[0].shape[2]
    positions = jnp.broadcast_to(prefix.length + jnp.arange(length), input_ids.shape)
    rope = rope_angles(positions, model.config)
    before = jnp.broadcast_to(jnp.arange(slots) < prefix.length, (length, slots))
    mask = jnp.concatenate([before, jnp.tri(length, dtype=bool)], axis=1)[None, None]
    x = model.embed_tokens(input_ids, model.dtype)
    for segment, all_keys, all_values in zip(model.segments, prefix.keys, prefix.values, strict=True):
        graph, stacked = nnx.split(segment)

        def block(
            x: jax.Array, given: tuple[nnx.State, jax.Array, jax.Array], graph: nnx.GraphDef = graph
        ) -> tuple[jax.Array, None]:
            layer, keys, values = given

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
                every_k, every_v = (
                    jnp.concatenate([jnp.broadcast_to(held, (batch, *held.shape[1:])), new], axis=1)
                    for held, new in ((keys, apply_rope(k, *rope)), (values, v))
                )
                return jax.nn.dot_product_attention(apply_rope(q, *rope), every_k, every_v, mask=mask), None

            return nnx.merge(graph, layer)(x, attend)[0], None

        x, _ = jax.lax.scan(block, x, (stacked, all_keys, all_values))
    return model.norm(x)
