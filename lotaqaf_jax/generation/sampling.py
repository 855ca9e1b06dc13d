"""The next token from logits: the most likely one, or a draw."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lotaqaf_jax.generation.checks import integer, number

__all__ = ["Sampling", "next_tokens", "token_distribution"]

_NO_LIMIT = int(np.iinfo(np.int32).max)
_LEAST_SHARE = float(np.finfo(np.float32).tiny)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; every field is a () array, so that other values run the same compiled program.

    Attributes:
        temperature: float32; logits are divided by it, 0 is greedy.
        top_k: int32; only the so many most likely tokens can be drawn.
        top_p: float32; only the fewest most likely tokens that together have this probability can be drawn.
        seed: uint32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array

    @classmethod
    def checked(cls, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> Sampling:
        """From what a user gives; None is no limit.

        Raises:
            ConfigError: a setting out of range.
        """
        share = "a probability above 0 and at most 1"
        top_p = 1.0 if top_p is None else number("top_p", top_p, share, _LEAST_SHARE, 1.0)
        top_k = _NO_LIMIT if top_k is None else integer("top_k", top_k, "a whole number from 1 on", 1)
        return cls(
            jnp.float32(number("temperature", temperature, "0 for greedy, or a positive number", 0.0)),
            jnp.int32(min(top_k, _NO_LIMIT)),
            jnp.float32(top_p),
            jnp.uint32(integer("seed", seed, "a whole number from 0 to 2**32 - 1", 0, 2**32 - 1)),
        )


def next_tokens(logits: jax.Array, sampling: Sampling, rows: jax.Array, step: jax.Array) -> jax.Array:
    """The next token of every row.

    Temperature 0 takes the most likely token, of equals the first. Otherwise a token is drawn from
    :func:`token_distribution`, with a random key made of the seed, the row's number and the step: what a row draws
    depends on none of its neighbours.

    Args:
        logits: (batch, vocab) float32.
        sampling: how to choose.
        rows: (batch,) int32, the number that each row's draws go by.
        step: () int32, how many tokens came before.

    Returns:
        (batch,) int32.
    """

    def draw(logits: jax.Array) -> jax.Array:
        key = jax.random.key(sampling.seed)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(rows)
        return jax.vmap(jax.random.categorical)(keys, token_distribution(logits, sampling)).astype(jnp.int32)

    def best(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, best, logits)


def token_distribution(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities, up to a constant a row, from which a token is drawn; -inf where none may be.

    In this order: logits / temperature; the ``top_k`` most likely tokens; of these the fewest most likely ones whose
    probabilities, renormalised, add up to ``top_p`` or more. Tokens as likely as the last one taken are taken too.

    Args:
        logits: (batch, vocab) float32.
        sampling: with a temperature above 0.

    Returns:
        (batch, vocab) float32.

    Source: top-p (nucleus) sampling, arXiv 1904.09751; top-k sampling, arXiv 1805.04833.
    """
    # The largest becomes 0 first, so that a small temperature takes the others to -inf and none to +inf.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature

    def limited(scaled: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(scaled, axis=-1)
        rank = jnp.minimum(sampling.top_k, scaled.shape[-1]).astype(jnp.float32)
        least = _least_taken(probabilities, jnp.ones_like(probabilities), rank)
        likely = jnp.where(probabilities >= least, probabilities, 0.0)
        share = sampling.top_p * jnp.sum(likely, axis=-1, keepdims=True)
        # With top_p 1 nothing falls to the rounding of a sum.
        least = jnp.where(sampling.top_p < 1, jnp.maximum(least, _least_taken(likely, likely, share)), least)
        return jnp.where(probabilities >= least, scaled, -jnp.inf)

    unlimited = (sampling.top_k >= scaled.shape[-1]) & (sampling.top_p >= 1)
    return jax.lax.cond(unlimited, lambda scaled: scaled, limited, scaled)


def _least_taken(values: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The largest v such that the weights of the values at or above v add up to ``target`` or more.

    Non-negative floats are ordered as their bit patterns, so v is found bit by bit from the top, with 31 sums; over a
    vocabulary of 150,000 that is quicker than a sort.

    Args:
        values: (batch, vocab) float32, not negative.
        weights: likewise; below 2**24 their number is exact where they are ones.
        target: () or (batch, 1) float32.

    Returns:
        (batch, 1) float32; 0 where all weights together do not reach the target.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def add_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (1 << (30 - i))
        reached = jnp.sum(jnp.where(bits >= candidate, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(reached >= target, candidate, found)

    start = jnp.zeros_like(bits[:, :1])
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, add_bit, start), jnp.float32)
