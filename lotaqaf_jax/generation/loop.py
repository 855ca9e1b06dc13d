"""Generation of tokens with a cache of keys and values: the prompts in one pass, then one compiled loop.

Where things stand. Prompts are padded on the right to P slots, and the k-th new token of every row goes to slot
P + k, whatever the length of its prompt: one slice is written for all rows. A row of n prompt tokens attends to its
slots 0 ... n-1 and P ... P+k, and its k-th new token has position n + k. So padding is seen by no token, the prompts
need no mask but the causal one, and a row's tokens do not depend on what else is in the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.generation.checks import integer
from lotaqaf_jax.generation.sampling import Sampling, next_tokens
from lotaqaf_jax.models import Decoder, round_lora
from lotaqaf_jax.models.cache import KVCache

__all__ = ["GenerationResult", "bucket", "generate"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What was generated.

    Attributes:
        tokens: (batch, max_new_tokens) int32, ``pad_token_id`` behind the end of each row.
        lengths: (batch,) int32, tokens of each row, the EOS token included.
        log_probs: (batch, max_new_tokens) float32, log softmax(logits)[token] of the model itself, whatever
            temperature, top_k and top_p were; 0 behind the end.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray


def generate(
    model: Decoder,
    input_ids: ArrayLike,
    lengths: ArrayLike,
    *,
    max_new_tokens: int | Sequence[int],
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad_token_id: int = 0,
    rows: ArrayLike | None = None,
) -> GenerationResult:
    """Continue a batch of prompts until every row has written an EOS token or as many tokens as it may.

    Rows, prompt length and number of new tokens are rounded up (:func:`bucket`), and one program is compiled for each
    combination; what the prompts and the sampling settings are makes no difference to it.

    Args:
        model: a decoder, base, adapted or merged.
        input_ids: (batch, length) integers, padded on the right with anything.
        lengths: (batch,) integers, tokens of each prompt.
        max_new_tokens: tokens that a row may write, at least 1; or one number for every row.
        eos_token_id: the token, or tokens, that end a row; None for none.
        temperature: 0 takes the most likely token each time; above 0, tokens are drawn from
            softmax(logits / temperature).
        top_k: draw only from the so many most likely tokens; None for all.
        top_p: draw only from the fewest most likely tokens that together have this probability; None for all.
        seed: of the draws, from 0 to 2**32 - 1.
        pad_token_id: what ``tokens`` holds behind a row's end.
        rows: (batch,) integers, the number that each row's draws go by; None for 0, 1, 2, ... A row with the same
            prompt, number and seed gets the same tokens in any batch.

    Returns:
        The new tokens, without the prompts.

    Raises:
        DataError: an empty prompt, a token id that is not of the model's vocabulary, or a prompt that is longer than
            the model's ``max_position_embeddings`` less the new tokens.
        ConfigError: a setting out of range.
    """
    sampling = Sampling.checked(temperature, top_k, top_p, seed)
    ids, length, numbers = _prompts(model, input_ids, lengths, rows)
    limit = _limits(max_new_tokens, len(ids))
    _check_place(model)
    _check_room(model, length, limit, numbers)
    stop = np.atleast_1d(np.asarray([] if eos_token_id is None else eos_token_id, np.int64))
    if stop.ndim != 1 or (stop < 0).any():
        raise ConfigError(f"eos_token_id: found {eos_token_id!r}, expected a token id, several, or None.")

    # Rows that fill up the batch have one token and may write none.
    batch, new = len(ids), int(limit.max())
    fill = (0, bucket(batch, 1) - batch)
    ids = np.pad(ids, (fill, (0, bucket(ids.shape[1], 16, 4) - ids.shape[1])))
    result = _program(model)(
        *nnx.split(model),
        ids.astype(np.int32),
        np.pad(length, fill, constant_values=1).astype(np.int32),
        np.pad(limit, fill).astype(np.int32),
        np.pad(numbers, fill).astype(np.int32),
        np.pad(stop, (0, bucket(len(stop), 4) - len(stop)), constant_values=-1).astype(np.int32),
        np.int32(pad_token_id),
        sampling,
        new=bucket(new, 16, 4),
    )
    tokens, written, log_probs = (np.asarray(array)[:batch] for array in result)
    return GenerationResult(tokens[:, :new], written, log_probs[:, :new])


def bucket(size: int, least: int, parts: int = 1) -> int:
    """A size at or above ``size`` and ``least``, one of few, so that few are compiled.

    A power of two; or, with ``parts``, one of so many evenly spaced sizes from each power of two to the next, but no
    closer to each other than ``least``.
    """
    below = 1 << (max(size - 1, 1).bit_length() - 1)
    step = max(below // parts, least)
    return -(-size // step) * step if size else least


def _prompts(
    model: Decoder, input_ids: ArrayLike, lengths: ArrayLike, rows: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prompts with zeros for padding (an id outside the table would embed as NaN), their lengths and numbers."""
    ids, length = np.asarray(input_ids), np.asarray(lengths)
    numbers = np.arange(len(ids)) if rows is None else np.asarray(rows)
    if ids.ndim != 2 or not len(ids) or not length.shape == numbers.shape == ids.shape[:1]:
        raise ValueError(
            f"input_ids {ids.shape}, lengths {length.shape}, rows {numbers.shape}: expected (batch, length), (batch,), "
            "(batch,), with a row at least"
        )
    if (length < 1).any():
        row = numbers[np.argmax(length < 1)]
        raise DataError(f"prompt {row} is empty, expected at least one token; begin it with the BOS token, say.")
    if (length > ids.shape[1]).any():
        raise ValueError(f"lengths go up to {length.max()}, but input_ids have {ids.shape[1]} columns")
    ids = np.where(np.arange(ids.shape[1]) < length[:, None], ids, 0)[:, : length.max()]
    vocab = model.config.vocab_size
    if (wrong := (ids < 0) | (ids >= vocab)).any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"prompt {numbers[row]}: token {column} is {ids[row, column]}, expected ids from 0 to {vocab - 1}. Is the "
            "tokenizer that of the model?"
        )
    return ids, length, numbers


def _limits(max_new_tokens: int | Sequence[int], batch: int) -> np.ndarray:
    """How many tokens each row may write, (batch,)."""
    limits = list(max_new_tokens) if isinstance(max_new_tokens, Sequence | np.ndarray) else [max_new_tokens] * batch
    if len(limits) != batch:
        raise ValueError(f"max_new_tokens: {len(limits)} numbers for {batch} rows")
    return np.asarray([integer("max_new_tokens", limit, "a whole number from 1 on", 1) for limit in limits], np.int64)


def _check_place(model: Decoder) -> None:
    if model.sharding is not None:
        raise ConfigError(
            f"generation: the model lies on a mesh of {model.sharding.mesh.size} devices, and decoding runs on one. "
            "Load the merged folder without a mesh; packed, a 70B model of 4 bit is 40 GB."
        )


def _check_room(model: Decoder, length: np.ndarray, limit: np.ndarray, numbers: np.ndarray) -> None:
    most = model.config.max_position_embeddings
    if (length + limit > most).any():
        row = int(np.argmax(length + limit > most))
        raise DataError(
            f"prompt {numbers[row]}: {length[row]} tokens and {limit[row]} new ones, expected together at most the "
            f"model's max_position_embeddings, {most}. Shorten the prompt or lower max_new_tokens."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Written:
    """The loop's state after ``step`` tokens of the longest row."""

    step: jax.Array
    last: jax.Array
    done: jax.Array
    lengths: jax.Array
    tokens: jax.Array
    log_probs: jax.Array


def _program(model: Decoder) -> Any:
    """:func:`_generate`, or on a GPU, where layers hold 16-bit weights, the same compiled otherwise."""
    dense = any(linear.quant is None for layer in model.spec.layers for _, linear in layer)
    return _of_dense_layers() if dense and jax.default_backend() == "gpu" else _generate


def _written_tokens(
    graph: nnx.GraphDef,
    state: nnx.State,
    input_ids: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    rows: jax.Array,
    stop: jax.Array,
    pad: jax.Array,
    sampling: Sampling,
    *,
    new: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens (batch, new), lengths (batch,) and log-probabilities (batch, new); arguments as :func:`generate`.

    Prompts and loop are one program, so that the cache is never an argument: the loop owns it from the start, and
    writes in place.
    """
    model = nnx.merge(graph, state)
    round_lora(model)
    batch, prompt = input_ids.shape

    def choose(hidden: jax.Array, written: _Written) -> _Written:
        """Add the token that follows ``hidden``, (batch, hidden), to every row that is not done."""
        logits = model.head(hidden)
        chosen = next_tokens(logits, sampling, rows, written.step)
        picked = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        tokens = jnp.where(written.done, pad, chosen)
        log_probs = jnp.where(written.done, 0.0, picked)
        lengths = written.lengths + ~written.done
        return _Written(
            step=written.step + 1,
            last=chosen,
            done=written.done | jnp.any(chosen[:, None] == stop, axis=-1) | (lengths >= limits),
            lengths=lengths,
            tokens=jax.lax.dynamic_update_slice(written.tokens, tokens[:, None], (0, written.step)),
            log_probs=jax.lax.dynamic_update_slice(written.log_probs, log_probs[:, None], (0, written.step)),
        )

    def go_on(carry: tuple[_Written, tuple[KVCache, ...]]) -> jax.Array:
        return ~jnp.all(carry[0].done)

    def extend(carry: tuple[_Written, tuple[KVCache, ...]]) -> tuple[_Written, tuple[KVCache, ...]]:
        written, caches = carry
        slot = prompt + written.step - 1
        slots = jnp.arange(prompt + new)
        valid = (slots < lengths[:, None]) | ((slots >= prompt) & (slots <= slot))
        positions = lengths + written.step - 1
        hidden, caches = model.cached_hidden_states(written.last[:, None], positions[:, None], caches, slot, valid)
        return choose(hidden[:, 0], written), caches

    nothing = _Written(
        step=jnp.int32(0),
        last=jnp.zeros(batch, jnp.int32),
        done=limits < 1,
        lengths=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, new), pad, jnp.int32),
        log_probs=jnp.zeros((batch, new), jnp.float32),
    )
    positions = jnp.broadcast_to(jnp.arange(prompt), input_ids.shape)
    hidden, caches = model.cached_hidden_states(input_ids, positions, model.empty_cache(batch, prompt + new), 0)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    written, _ = jax.lax.while_loop(go_on, extend, (choose(last, nothing), caches))
    return written.tokens, written.lengths, written.log_probs


_generate = jax.jit(_written_tokens, static_argnums=0, static_argnames="new")


@functools.cache
def _of_dense_layers() -> Any:
    """:func:`_generate` with all products by cuBLAS, which read a layer's weights where the stack holds them.

    XLA's own kernels would have each copied out of the stack first, at twice the bytes of the product.
    """
    options = {"xla_gpu_enable_triton_gemm": False}
    return jax.jit(_written_tokens, static_argnums=0, static_argnames="new", compiler_options=options)
