"""Cross entropy over response tokens, computed in chunks so that the full logits never exist."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lotaqaf_jax.models import Decoder

__all__ = ["IGNORE", "TokenScores", "score_tokens", "summed_loss", "targets_of"]

IGNORE = -100
# Logits of one chunk, in float32 values: 64 MiB.
_CHUNK_VALUES = 2**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Per position: ``loss`` (batch, length) float32, in nats, 0 where there is no target; ``correct`` bool, whether
    the most likely token is the target; ``counted`` bool, whether there is one."""

    loss: jax.Array
    correct: jax.Array
    counted: jax.Array


def targets_of(labels: jax.Array) -> jax.Array:
    """What each position has to predict: ``labels`` one to the left, :data:`IGNORE` at the end. (batch, length)."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


def score_tokens(
    model: Decoder,
    input_ids: jax.Array,
    labels: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    remat: bool = False,
) -> TokenScores:
    """Loss and argmax of every next token.

        loss[b, t] = -log softmax(logits[b, t])[labels[b, t+1]]

    Args:
        model: the decoder.
        input_ids: (batch, length) int32.
        labels: (batch, length) int32, aligned with ``input_ids``, :data:`IGNORE` where no loss is taken and at the
            first token of every example.
        positions: (batch, length) int32.
        segment_ids: (batch, length) int32, 0 for padding.
        remat: recompute activations in the backward pass.
    """
    hidden = model.hidden_states(input_ids, positions, segment_ids, remat=remat)
    batch, length, size = hidden.shape
    targets = targets_of(labels).reshape(-1)
    chunk = max(1, min(batch * length, _CHUNK_VALUES // model.config.vocab_size))
    chunks = -(-batch * length // chunk)
    missing = chunks * chunk - batch * length
    flat = jnp.pad(hidden.reshape(-1, size), ((0, missing), (0, 0))).reshape(chunks, chunk, size)
    padded = jnp.pad(targets, (0, missing), constant_values=IGNORE).reshape(chunks, chunk)

    # Recomputed in the backward pass: otherwise the scan would keep every chunk's logits.
    @jax.checkpoint
    def score(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.head(hidden)
        counted = targets != IGNORE
        picked = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[:, None], axis=-1)[:, 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.where(counted, loss, 0.0), counted & (jnp.argmax(logits, axis=-1) == targets)

    loss, correct = jax.lax.map(lambda pair: score(*pair), (flat, padded))

    def whole(array: jax.Array) -> jax.Array:
        return array.reshape(-1)[: batch * length].reshape(batch, length)

    return TokenScores(whole(loss), whole(correct), targets.reshape(batch, length) != IGNORE)


def summed_loss(model: Decoder, batch: dict[str, jax.Array], *, remat: bool = False) -> jax.Array:
    """Sum of the loss over the targets of a batch (see docs/architecture.md for its arrays), a float32 scalar."""
    scores = score_tokens(
        model, batch["input_ids"], batch["labels"], batch["positions"], batch["segment_ids"], remat=remat
    )
    return scores.loss.sum()
