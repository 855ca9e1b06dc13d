"""What can be drawn, against a sort of the whole vocabulary; and how often it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lotaqaf_jax.generation.sampling import Sampling, next_tokens, token_distribution

VOCAB = 12
distribution = jax.jit(token_distribution)
draw = jax.jit(next_tokens)


def brute_force(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Probabilities (vocab,) by sorting, in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)[: top_k or VOCAB]
    likely = np.exp(scaled[order] - scaled[order[0]])
    likely /= likely.sum()
    if top_p is not None:
        # Taken while those before do not reach top_p.
        likely = likely[np.concatenate([[True], np.cumsum(likely)[:-1] < top_p])]
    probabilities = np.zeros(VOCAB)
    probabilities[order[: len(likely)]] = likely / likely.sum()
    return probabilities


def sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0) -> Sampling:
    return Sampling.checked(temperature, top_k, top_p, seed)


@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.2, 5),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(0.01, 0.99),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_sort(seed: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (3, VOCAB)).astype(np.float32)
    found = jax.nn.softmax(distribution(jnp.asarray(logits), sampling(temperature, top_k, top_p)), axis=-1)
    for row, probabilities in zip(logits, np.asarray(found), strict=True):
        np.testing.assert_allclose(probabilities, brute_force(row, temperature, top_k, top_p), atol=1e-5)


def test_no_limit_leaves_even_the_least_likely_token() -> None:
    logits = jnp.asarray([[0.0, -80.0] + [-5.0] * 10])
    for given_sampling in (sampling(), sampling(top_k=VOCAB), sampling(top_p=1.0), sampling(top_k=99, top_p=1.0)):
        assert np.isfinite(distribution(logits, given_sampling)).all()


def test_equally_likely_tokens_are_taken_together() -> None:
    logits = jnp.asarray([[3.0, 3.0, 1.0] + [0.0] * 9])
    assert np.isfinite(distribution(logits, sampling(top_k=1)))[0].tolist() == [True, True] + [False] * 10


@pytest.mark.parametrize(
    "limits", [{"temperature": 2.0}, {"top_p": 0.8}, {"temperature": 0.6, "top_k": 5, "top_p": 0.95}]
)
def test_tokens_are_drawn_as_often_as_they_are_likely(limits: dict[str, Any]) -> None:
    logits = np.random.default_rng(2).normal(0, 1, VOCAB).astype(np.float32)
    rows = 20_000
    tokens = draw(jnp.tile(logits, (rows, 1)), sampling(**limits, seed=11), jnp.arange(rows), jnp.int32(4))
    expected = brute_force(logits, **({"temperature": 1.0, "top_k": None, "top_p": None} | limits))
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert 1 < possible.sum() <= VOCAB
    assert stats.chisquare(counts[possible], rows * expected[possible]).pvalue > 0.01


def test_steps_and_rows_draw_apart() -> None:
    """The draws of two steps, or of two rows, agree no more often than chance has it."""
    flat = jnp.zeros((4000, VOCAB))
    rows = jnp.arange(4000)
    one, other = (np.asarray(draw(flat, sampling(), rows, jnp.int32(step))) for step in (0, 1))
    for agreement in (one == other, one[1:] == one[:-1], one[1:] == other[:-1]):
        assert abs(agreement.mean() - 1 / VOCAB) < 0.02


def test_temperature_zero_is_the_most_likely_token() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, VOCAB)), jnp.float32)
    found = draw(logits, sampling(0.0, top_k=3, top_p=0.5), jnp.arange(50), jnp.int32(0))
    np.testing.assert_array_equal(found, np.argmax(logits, -1))


def test_a_huge_top_k_is_no_limit() -> None:
    assert int(sampling(top_k=2**40).top_k) == 2**31 - 1
