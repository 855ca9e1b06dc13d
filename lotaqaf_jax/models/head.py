"""From hidden states to losses: the output layer, whole on a device or with its vocabulary cut over several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lotaqaf_jax.kernels.sharded import shard_map, tensor_sum
from lotaqaf_jax.kernels.sharding import BATCH, TENSOR, batch_axes, spec
from lotaqaf_jax.models.decoder import Decoder, logits_of
from lotaqaf_jax.models.layers import Embed, Linear

__all__ = ["Head", "on_rows"]


@dataclasses.dataclass(frozen=True)
class Head:
    """The output layer as one device has it.

    Attributes:
        layer: the whole of it, or the part of the vocabulary that is this device's.
        cut: whether it is a part. Parts lie along the mesh axis TENSOR, in order.
    """

    layer: Embed | Linear
    cut: bool = False

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., hidden) -> (..., vocab here) float32."""
        return logits_of(self.layer, hidden)

    def log_sum(self, logits: jax.Array) -> jax.Array:
        """log sum_v exp(logits[..., v]) over the whole vocabulary."""
        if not self.cut:
            return jax.nn.logsumexp(logits, axis=-1)
        largest = jax.lax.pmax(logits.max(-1), TENSOR)
        return largest + jnp.log(jax.lax.psum(jnp.exp(logits - largest[..., None]).sum(-1), TENSOR))

    def pick(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """logits[n, targets[n]], for (tokens, vocab here) and (tokens,)."""
        if not self.cut:
            return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.lax.psum(jnp.where(self.hit(logits, targets), logits, 0.0).sum(-1), TENSOR)

    def hit(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """(tokens, vocab here) bool: the places of the targets."""
        return self._ids(logits) == targets[:, None]

    def most_likely(self, logits: jax.Array) -> jax.Array:
        """argmax_v, the first of equals; (tokens,) int32."""
        best = jnp.argmax(logits, axis=-1)
        if not self.cut:
            return best
        value = logits.max(-1)
        ids = jnp.where(value == jax.lax.pmax(value, TENSOR), self._ids(logits)[best], jnp.iinfo(jnp.int32).max)
        return jax.lax.pmin(ids, TENSOR)

    def summed(self, part: jax.Array) -> jax.Array:
        """What every part of the vocabulary contributes, added."""
        return tensor_sum(part, self.cut)

    def _ids(self, logits: jax.Array) -> jax.Array:
        count = logits.shape[-1]
        first = jax.lax.axis_index(TENSOR) * count if self.cut else 0
        return first + jnp.arange(count)


def on_rows(
    model: Decoder, function: Callable[..., tuple[jax.Array, ...]], rows: Sequence[jax.Array], summed: Sequence[bool]
) -> Any:
    """``function`` (head, *rows), which each device computes of its own rows of a batch.

    Chunks of tokens are then cut within a device: cut over the whole batch, a chunk would lie on one device.

    Args:
        model: whose output layer it is.
        function: gives as many arrays as ``summed`` has entries.
        rows: arrays (batch, ...).
        summed: of each result, whether it is a sum over all rows; else it is (batch, ...).
    """
    layer, where = model.output_layer, model.sharding
    if where is None:
        return function(Head(layer), *rows)
    cut = where.vocab and not (isinstance(layer, Linear) and layer.is_quantized)
    graph, state = nnx.split(layer)
    split = batch_axes(where.mesh, len(rows[0]))

    def local(state: nnx.State, *rows: jax.Array) -> tuple[jax.Array, ...]:
        layer = nnx.merge(graph, state)
        if isinstance(layer, Linear):
            layer.sharding = None
        found = function(Head(layer, cut), *rows)
        return tuple(
            jax.lax.psum(one, BATCH) if total and split else one for one, total in zip(found, summed, strict=True)
        )

    specs = jax.tree.map(lambda _: spec((TENSOR,) if cut else ()), state)
    outs = tuple(spec() if total else spec(split) for total in summed)
    return shard_map(local, where.mesh, (specs, *[spec(split)] * len(rows)), outs)(state, *rows)
