"""Cross entropy over response tokens, computed in chunks so that the full logits never exist."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lotaqaf_jax.data import IGNORE
from lotaqaf_jax.models import Decoder, Recompute
from lotaqaf_jax.models.head import Head, on_rows

__all__ = ["TokenScores", "score_tokens", "summed_loss", "targets_of"]

# Logits of one chunk, in float32 values: 256 MiB. Enough rows for a matrix product at full speed with any vocabulary.
_CHUNK_VALUES = 2**26


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
    segment_ids: jax.Array | None,
) -> TokenScores:
    """Loss and argmax of every next token.

        loss[b, t] = -log softmax(logits[b, t])[labels[b, t+1]]

    Args:
        model: the decoder.
        input_ids: (batch, length) int32.
        labels: (batch, length) int32, aligned with ``input_ids``, :data:`IGNORE` where no loss is taken and at the
            first token of every example.
        positions: (batch, length) int32.
        segment_ids: (batch, length) int32, 0 for padding; None where every row is one example, padded at its end: no
            token then comes after padding, and causality is mask enough.
    """
    hidden = model.hidden_states(input_ids, positions, segment_ids)
    targets = targets_of(labels)
    vocab_size = model.config.vocab_size

    def local(head: Head, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, targets = chunk
            logits = head.logits(hidden)
            loss, _, counted = _losses(head, logits, targets)
            return loss, counted & (head.most_likely(logits) == targets)

        scores = jax.lax.map(score, _chunks(hidden, targets, vocab_size))
        loss, correct = (array.reshape(-1)[: targets.size].reshape(targets.shape) for array in scores)
        return loss, correct

    loss, correct = on_rows(model, local, (hidden, targets), summed=(False, False))
    return TokenScores(loss, correct, targets != IGNORE)


def _chunks(hidden: jax.Array, targets: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Cut all positions into chunks: (chunks, tokens, hidden) and (chunks, tokens), filled up with no targets."""
    size, count = hidden.shape[-1], targets.size
    tokens = max(1, min(count, _CHUNK_VALUES // vocab_size))
    chunks = -(-count // tokens)
    missing = chunks * tokens - count
    flat = jnp.pad(hidden.reshape(-1, size), ((0, missing), (0, 0)))
    padded = jnp.pad(targets.reshape(-1), (0, missing), constant_values=IGNORE)
    return flat.reshape(chunks, tokens, size), padded.reshape(chunks, tokens)


def _losses(head: Head, logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss of every token, log of the sum of exponentials, whether there is a target)."""
    counted = targets != IGNORE
    log_sum = head.log_sum(logits)
    picked = head.pick(logits, jnp.where(counted, targets, 0))
    return jnp.where(counted, log_sum - picked, 0.0), log_sum, counted


def summed_loss(
    model: Decoder, batch: dict[str, jax.Array], *, recompute: Recompute = "none", packed: bool = True
) -> jax.Array:
    """Sum of the loss over the targets of a batch (see docs/architecture.md for its arrays), a float32 scalar.

    ``packed`` says that a row may hold several examples, which must not see each other.
    """
    segment_ids = batch["segment_ids"] if packed else None
    hidden = model.hidden_states(batch["input_ids"], batch["positions"], segment_ids, recompute=recompute)
    return _summed(*nnx.split(model), hidden, targets_of(batch["labels"]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(graph: nnx.GraphDef, state: nnx.State, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum of the loss from the last hidden states. The head is frozen: gradients reach ``hidden`` alone."""
    return _summed_fwd(graph, state, hidden, targets)[0]


def _summed_fwd(
    graph: nnx.GraphDef, state: nnx.State, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss, and its gradient at ``hidden``, which is at hand while a chunk's logits are."""
    model = nnx.merge(graph, state)
    vocab_size = model.config.vocab_size

    def local(head: Head, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, targets = chunk
            logits, pull = jax.vjp(head.logits, hidden)
            loss, log_sum, counted = _losses(head, logits, targets)
            dlogits = jnp.where(counted[:, None], jnp.exp(logits - log_sum[:, None]) - head.hit(logits, targets), 0.0)
            return total + loss.sum(), head.summed(pull(dlogits)[0])

        total, dhidden = jax.lax.scan(add, jnp.float32(0), _chunks(hidden, targets, vocab_size))
        return total, dhidden.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)

    total, dhidden = on_rows(model, local, (hidden, targets), summed=(True, False))
    return total, dhidden


def _summed_bwd(graph: nnx.GraphDef, dhidden: jax.Array, g: jax.Array) -> tuple[None, jax.Array, None]:
    return None, (g * dhidden.astype(jnp.float32)).astype(dhidden.dtype), None


_summed.defvjp(_summed_fwd, _summed_bwd)
