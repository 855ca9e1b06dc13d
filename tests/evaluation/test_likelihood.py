"""Log-likelihoods against torch, and against themselves computed the long way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.evaluation import Span, likelihood, log_likelihoods, next_token_scores
from lotaqaf_jax.evaluation.prefix import common_prefix
from lotaqaf_jax.models import Decoder, add_adapters, merge
from tests.evaluation.conftest import Pair, torch_log_probs
from tests.models.tiny import CONFIG, quantized_decoder, set_random_adapters


def draw_spans(vocab: int, lengths: list[int], seed: int = 0) -> list[Span]:
    rng = np.random.default_rng(seed)
    return [Span(rng.integers(0, vocab, n).tolist(), int(rng.integers(1, n))) for n in lengths]


def test_every_token_as_torch_has_it(pair: Pair) -> None:
    spans = draw_spans(320, [2, 17, 40, 5, 18, 33, 3])
    # A greedy token among them, so that both values of `greedy` are seen.
    ids, start = spans[2]
    best = int(torch_log_probs(pair.theirs, list(ids[:start]))[-1].argmax())
    spans[2] = Span([*ids[:start], best, *ids[start + 1 :]], start)
    found = log_likelihoods(pair.ours, spans, batch_size=3)
    assert found[2].greedy[0]
    for (ids, start), one in zip(spans, found, strict=True):
        rows = torch_log_probs(pair.theirs, list(ids))[start - 1 : -1]
        expected = rows[np.arange(len(rows)), ids[start:]]
        np.testing.assert_allclose(one.log_probs, expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(one.greedy, rows.argmax(-1) == ids[start:])
        assert one.total == pytest.approx(expected.sum(), rel=1e-5)


@pytest.fixture(scope="module")
def adapted() -> Decoder:
    model = add_adapters(quantized_decoder(), rank=8, omega=2.0)
    set_random_adapters(model)
    return model


def by_logits(model: Decoder, ids: list[int]) -> np.ndarray:
    """(length, vocab) log-probabilities of one sequence by a plain call, of one length for all: no token sees those
    behind it."""
    padded = np.pad(ids, (0, 64 - len(ids)))
    return np.asarray(jax.nn.log_softmax(model(jnp.asarray(padded[None]))[0]))[: len(ids)]


@pytest.mark.parametrize("kind", ["base", "adapted", "merged"])
def test_base_adapter_and_merged_models(adapted: Decoder, kind: str) -> None:
    model = {"base": quantized_decoder, "adapted": lambda: adapted, "merged": lambda: merge(adapted)}[kind]()
    spans = draw_spans(CONFIG.vocab_size, [9, 30])
    for (ids, start), one in zip(spans, log_likelihoods(model, spans), strict=True):
        rows = by_logits(model, list(ids))[start - 1 : -1]
        np.testing.assert_allclose(one.log_probs, rows[np.arange(len(rows)), ids[start:]], rtol=1e-5, atol=1e-5)


def test_batches_and_chunks_change_nothing(adapted: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = draw_spans(CONFIG.vocab_size, [4, 28, 9, 9, 17, 2, 30])
    alone = [log_likelihoods(adapted, [span])[0].log_probs for span in spans]
    together = log_likelihoods(adapted, spans, batch_size=len(spans))
    # Logits of five positions at a time, which does not go into the positions of a batch.
    monkeypatch.setattr(likelihood, "_CHUNK_VALUES", 5 * CONFIG.vocab_size)
    chunked = log_likelihoods(adapted, spans, batch_size=3)
    for one, *others in zip(alone, together, chunked, strict=True):
        for other in others:
            np.testing.assert_allclose(other.log_probs, one, rtol=1e-5, atol=1e-5)


def test_next_tokens_with_a_shared_beginning(pair: Pair) -> None:
    """A beginning of 41 tokens is computed once; all come out as torch has them for the whole prompts."""
    rng = np.random.default_rng(1)
    beginning = rng.integers(0, 320, 41).tolist()
    prompts = [beginning + rng.integers(0, 320, n).tolist() for n in (1, 20, 7, 33, 2)]
    tokens = [5, 300, 17]
    assert common_prefix(prompts) == 41
    expected = np.stack([torch_log_probs(pair.theirs, prompt)[-1, tokens] for prompt in prompts])
    for share in (True, False):
        found = next_token_scores(pair.ours, prompts, tokens, batch_size=2, share_prefix=share)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_prompt_that_is_the_beginning_of_another(adapted: Decoder) -> None:
    """The shortest prompt keeps a token of its own, behind which the next one is read off."""
    ids = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 60).tolist()
    prompts = [ids[:50], ids, ids[:50]]
    assert common_prefix(prompts) == 49
    found = next_token_scores(adapted, prompts, [1, 2, 3])
    expected = np.stack([by_logits(adapted, prompt)[-1, [1, 2, 3]] for prompt in prompts])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5))
def test_common_prefix(sequences: list[list[int]]) -> None:
    count = common_prefix(sequences)
    shortest = min(len(ids) for ids in sequences)
    assert len({tuple(ids[:count]) for ids in sequences}) == 1
    assert count == shortest - 1 or len({tuple(ids[: count + 1]) for ids in sequences}) > 1


def test_what_cannot_be_scored(adapted: Decoder) -> None:
    with pytest.raises(DataError, match=f"row 1: a token is {CONFIG.vocab_size}"):
        log_likelihoods(adapted, [Span([1, 2], 1), Span([1, CONFIG.vocab_size], 1)])
    with pytest.raises(ConfigError, match="batch_size: found 0"):
        log_likelihoods(adapted, [Span([1, 2], 1)], batch_size=0)
    assert log_likelihoods(adapted, []) == []
