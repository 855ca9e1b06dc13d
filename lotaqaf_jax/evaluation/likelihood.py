"""How likely a model finds given tokens: the ground that perplexity, multiple choice and lm-eval stand on."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from lotaqaf_jax.data import IGNORE
from lotaqaf_jax.errors import DataError
from lotaqaf_jax.evaluation.prefix import Prefix, common_prefix, hidden_after, read_prefix
from lotaqaf_jax.generation.checks import integer
from lotaqaf_jax.generation.loop import bucket
from lotaqaf_jax.models import Decoder

__all__ = ["Scored", "Span", "log_likelihoods", "next_token_scores"]

# Logits of one chunk, in float32 values: 256 MiB.
_CHUNK_VALUES = 2**26

# A shared beginning of fewer tokens is not worth programs of its own.
_LEAST_SHARED = 32


class Span(NamedTuple):
    """Token ids, of which those from ``start`` on are scored: 1 or more, since nothing predicts the first token."""

    ids: Sequence[int]
    start: int


class Scored(NamedTuple):
    """``log_probs`` (tokens,) float32: log softmax of each scored token; ``greedy`` (tokens,) bool: whether it is the
    most likely one."""

    log_probs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        """The log-likelihood of all scored tokens, in nats, summed in float64."""
        return float(self.log_probs.sum(dtype=np.float64))


def log_likelihoods(
    model: Decoder, spans: Sequence[Span], *, batch_size: int = 8, progress: str | None = None
) -> list[Scored]:
    """The log-probability of every scored token, given all before it in its sequence.

        log_probs[t] = log softmax(model(ids[: start + t]))[ids[start + t]]

    Sequences of similar length share a batch, the longest first. The last token of a sequence is never an input, so a
    model of context L takes L + 1 of them.

    Args:
        model: base, adapted or merged.
        spans: what to score, in any order.
        batch_size: sequences that are computed together, at most.
        progress: title of a progress bar, or None for none.

    Returns:
        The scores, in the order of ``spans``.

    Raises:
        DataError: a token id that is not of the model's vocabulary.
        ConfigError: a batch size below 1.
    """
    _check_ids(model, [span.ids for span in spans])
    graph, state = nnx.split(model)
    found: list[Scored | None] = [None] * len(spans)
    with tqdm(total=len(spans), desc=progress, unit="row", leave=False, disable=progress is None) as bar:
        for rows, size in _batches([len(span.ids) - 1 for span in spans], batch_size):
            longest = max(len(spans[i].ids) for i in rows) - 1
            inputs = np.zeros((size, bucket(longest, 32, 4)), np.int32)
            targets = np.full_like(inputs, IGNORE)
            for place, i in enumerate(rows):
                ids, start = spans[i]
                inputs[place, : len(ids) - 1] = ids[:-1]
                targets[place, start - 1 : len(ids) - 1] = ids[start:]
            log_probs, greedy = (np.asarray(array) for array in _score(graph, state, inputs, targets))
            for place, i in enumerate(rows):
                scored = slice(spans[i].start - 1, len(spans[i].ids) - 1)
                found[i] = Scored(log_probs[place, scored], greedy[place, scored])
            bar.update(len(rows))
    return [one for one in found if one is not None]


def next_token_scores(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    batch_size: int = 8,
    share_prefix: bool = True,
    progress: tqdm | None = None,
) -> np.ndarray:
    """The log-probability of each of a few tokens to come next after each prompt.

        scores[i, j] = log softmax(model(prompts[i]))[tokens[j]]

    What all prompts begin with is run through the model once, and its keys and values are shared. That changes no more
    than the last digits.

    Args:
        model: base, adapted or merged.
        prompts: token ids, none empty.
        tokens: the candidates.
        batch_size: prompts that are computed together, at most.
        share_prefix: False computes every prompt whole.
        progress: a bar to move on by one for each prompt.

    Returns:
        (prompts, tokens) float32.

    Raises:
        DataError: a token id that is not of the model's vocabulary.
        ConfigError: a batch size below 1.
    """
    _check_ids(model, [*prompts, tokens])
    graph, state = nnx.split(model)
    shared = common_prefix([list(prompt) for prompt in prompts]) if share_prefix and len(prompts) > 1 else 0
    shared = shared if shared >= _LEAST_SHARED else 0
    prefix: Prefix | None = None
    if shared:
        beginning = np.zeros((1, bucket(shared, 128, 2)), np.int32)
        beginning[0, :shared] = prompts[0][:shared]
        prefix = _prefix(graph, state, beginning, np.int32(shared))
    scores = np.zeros((len(prompts), len(tokens)), np.float32)
    for rows, size in _batches([len(prompt) - shared for prompt in prompts], batch_size):
        lengths = np.ones(size, np.int32)
        lengths[: len(rows)] = [len(prompts[i]) - shared for i in rows]
        inputs = np.zeros((size, bucket(int(lengths.max()), 32, 2)), np.int32)
        for place, i in enumerate(rows):
            inputs[place, : lengths[place]] = prompts[i][shared:]
        scores[rows] = np.asarray(_next(graph, state, prefix, inputs, lengths, np.asarray(tokens)))[: len(rows)]
        if progress is not None:
            progress.update(len(rows))
    return scores


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of similar length, the longest first, and to how many rows they are filled up.

    Full batches, and a rest that is filled up to a power of two: so that few programs are compiled, however many rows
    there are.
    """
    batch_size = integer("batch_size", batch_size, "a whole number from 1 on", 1)
    order = np.argsort([-length for length in lengths], kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, min(batch_size, bucket(len(rows), 1))


def _check_ids(model: Decoder, sequences: Sequence[Sequence[int]]) -> None:
    vocab = model.config.vocab_size
    for row, ids in enumerate(sequences):
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise DataError(
                f"row {row}: a token is {wrong}, expected ids from 0 to {vocab - 1}. Is the tokenizer that of the "
                "model?"
            )


@functools.partial(jax.jit, static_argnums=0)
def _score(graph: nnx.GraphDef, state: nnx.State, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every target, and whether it is the most likely token; (batch, length), 0 without a target.

    Logits are made for a chunk of positions at a time.
    """
    model = nnx.merge(graph, state)
    hidden = model.hidden_states(inputs)
    chunk = max(1, min(targets.size, _CHUNK_VALUES // model.config.vocab_size))
    missing = -targets.size % chunk
    states = jnp.pad(hidden.reshape(targets.size, -1), ((0, missing), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    wanted = jnp.pad(targets.reshape(-1), (0, missing), constant_values=IGNORE).reshape(-1, chunk)

    def score(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, wanted = pair
        logits = model.head(hidden)
        picked = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[:, None], axis=-1)[:, 0]
        log_probs = picked - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(wanted == IGNORE, 0.0, log_probs), jnp.argmax(logits, axis=-1) == wanted

    log_probs, greedy = jax.lax.map(score, (states, wanted))
    return tuple(array.reshape(-1)[: targets.size].reshape(targets.shape) for array in (log_probs, greedy))


@functools.partial(jax.jit, static_argnums=0)
def _prefix(graph: nnx.GraphDef, state: nnx.State, input_ids: jax.Array, length: jax.Array) -> Prefix:
    return read_prefix(nnx.merge(graph, state), input_ids, length)


@functools.partial(jax.jit, static_argnums=0)
def _next(
    graph: nnx.GraphDef,
    state: nnx.State,
    prefix: Prefix | None,
    inputs: jax.Array,
    lengths: jax.Array,
    tokens: jax.Array,
) -> jax.Array:
    """Log-probabilities of ``tokens`` behind each row, (batch, tokens)."""
    model = nnx.merge(graph, state)
    hidden = model.hidden_states(inputs) if prefix is None else hidden_after(model, prefix, inputs)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    logits = model.head(last)
    return logits[:, tokens] - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
