"""Perplexity as it is said to be computed, against torch."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.evaluation import document_perplexity, perplexity
from lotaqaf_jax.evaluation.text_loss import rolling_spans
from lotaqaf_jax.models import load_pretrained
from lotaqaf_jax.models.pretrained import load_tokenizer
from tests.evaluation.conftest import Pair, torch_log_probs

TEXTS = ["Once upon a time there was a fox.", "It said: “¿qué?” and ran, ran, ran away over the hills and fields.", "x"]
WINDOW = 24


def test_windows_as_torch_computes_them(pair: Pair) -> None:
    """Join, tokenize, cut, drop the rest; every window's first token is not predicted. Transformers' own loss is the
    mean over a window's other tokens, so that windows of one length have it as their mean."""
    import torch

    ids = pair.tokenizer("\n\n".join(TEXTS)).input_ids
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    assert len(windows) > 2
    assert len(ids) % WINDOW > 0
    with torch.no_grad():
        losses = [float(pair.theirs(torch.tensor([row]), labels=torch.tensor([row])).loss) for row in windows]
    found = perplexity(pair.ours, pair.tokenizer, TEXTS, window=WINDOW, batch_size=2)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert [unit.loss / unit.tokens for unit in found.units] == pytest.approx(losses, rel=1e-5)
    assert (found.tokens, found.dropped) == (len(windows) * (WINDOW - 1), len(ids) % WINDOW)
    # One token is one byte here, or a part of a character whose bytes are all in the same window.
    text = "\n\n".join(TEXTS)
    starts = [len(pair.tokenizer.decode(ids[: i * WINDOW + 1])) for i in range(len(windows))]
    ends = [len(pair.tokenizer.decode(ids[: (i + 1) * WINDOW])) for i in range(len(windows))]
    size = sum(len(text[a:b].encode()) for a, b in zip(starts, ends, strict=True))
    assert found.text_bytes == size
    assert found.bits_per_byte == pytest.approx(sum(losses) * (WINDOW - 1) / math.log(2) / size, rel=1e-5)


def test_a_text_shorter_than_a_window_is_one(pair: Pair) -> None:
    found = perplexity(pair.ours, pair.tokenizer, TEXTS[0], window=200)
    ids = pair.tokenizer(TEXTS[0]).input_ids
    assert (found.tokens, found.dropped, len(found.units)) == (len(ids) - 1, 0, 1)
    assert found.interval is None
    assert perplexity(pair.ours, pair.tokenizer, TEXTS[0]).window == 256, "the model's context is shorter than 2048"


def test_documents_predict_every_token_once(pair: Pair) -> None:
    """Texts shorter than the window: the loss of each from BOS on, by torch; and bits over all of its bytes."""
    found = document_perplexity(pair.ours, pair.tokenizer, [*TEXTS, ""], window=200)
    bos, losses = pair.tokenizer.bos_token_id, []
    for text in TEXTS:
        ids = [bos, *pair.tokenizer(text, add_special_tokens=False).input_ids]
        rows = torch_log_probs(pair.theirs, ids)[:-1]
        losses.append(-rows[np.arange(len(rows)), ids[1:]].sum())
    assert [unit.loss for unit in found.units] == pytest.approx(losses, rel=1e-5)
    assert [unit.text_bytes for unit in found.units] == [len(text.encode()) for text in TEXTS]
    assert found.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / len("".join(TEXTS).encode()), rel=1e-5)
    assert (found.empty, found.dropped) == (1, 0)
    low, high = found.interval or (0, 0)
    assert low < found.loss < high


def test_documents_longer_than_the_window(pair: Pair) -> None:
    """By the rule itself: tokens at a window's start see as many tokens as there are, up to the window."""
    found = document_perplexity(pair.ours, pair.tokenizer, [TEXTS[1]], window=WINDOW)
    ids = pair.tokenizer(TEXTS[1], add_special_tokens=False).input_ids
    whole = [pair.tokenizer.bos_token_id, *ids]
    loss = 0.0
    for start in range(0, len(ids), WINDOW):
        stop = min(start + WINDOW, len(ids))
        seen = whole[max(0, stop - WINDOW) : stop]
        rows = torch_log_probs(pair.theirs, seen)[-(stop - start) :]
        loss -= rows[np.arange(len(rows)), ids[start:stop]].sum()
    assert found.units[0].loss == pytest.approx(loss, rel=1e-5)


@given(st.integers(1, 60), st.integers(1, 20))
def test_rolling_spans(count: int, length: int) -> None:
    ids = list(range(1, count + 1))
    spans = rolling_spans(ids, 0, length)
    scored = [token for span in spans for token in span.ids[span.start :]]
    assert scored == ids
    for span in spans:
        assert 1 <= span.start < len(span.ids) <= length + 1
        # What is read is one stretch of the text, with the first token before it.
        assert list(span.ids) == list(range(span.ids[0], span.ids[-1] + 1))
    assert len(spans[-1].ids) == min(length, count) + 1, "the last predictions see as much as there is, up to the limit"


def test_rolling_spans_of_the_example_that_lm_eval_documents() -> None:
    """Tokens 0 to 9, context of 4: BOS 0 1 2 | 3 4 5 6 | 5 6 7 8, the last predicting 8 and 9 alone."""
    spans = rolling_spans(list(range(10)), -1, 4)
    assert [list(span.ids[:-1]) for span in spans] == [[-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [list(span.ids[span.start :]) for span in spans] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_limits_and_mistakes(pair: Pair) -> None:
    whole = perplexity(pair.ours, pair.tokenizer, TEXTS, window=WINDOW)
    first = perplexity(pair.ours, pair.tokenizer, TEXTS, window=WINDOW, limit=1)
    assert [unit.loss for unit in first.units] == pytest.approx([whole.units[0].loss])
    assert first.dropped == whole.dropped + WINDOW * (len(whole.units) - 1)
    assert len(document_perplexity(pair.ours, pair.tokenizer, TEXTS, limit=2).units) == 2
    for window in (1, 257):
        with pytest.raises(ConfigError, match=f"window: found {window}, expected 2 to 256"):
            perplexity(pair.ours, pair.tokenizer, TEXTS, window=window)
    with pytest.raises(DataError, match="0 tokens, expected at least 2"):
        perplexity(pair.ours, pair.tokenizer, "")
    with pytest.raises(DataError, match="none of the 2 documents"):
        document_perplexity(pair.ours, pair.tokenizer, ["", ""])


def test_no_bits_per_byte_where_the_tokenizer_does_not_know_the_text(shared: Path) -> None:
    """A tokenizer of 105 characters has no newline: the loss of what it does not know is not that of the text."""
    folder = shared / "data" / "checkpoints" / "babyllama105"
    model, tokenizer = load_pretrained(folder, progress=False), load_tokenizer(folder)
    story = "Once upon a time, there was a little girl named Lily."
    known = document_perplexity(model, tokenizer, [story])
    assert known.loss < 1.5
    assert known.bits_per_byte == pytest.approx(known.units[0].loss / math.log(2) / len(story))
    unknown = document_perplexity(model, tokenizer, [story, "one\ntwo"])
    assert unknown.unknown == 1
    assert unknown.bits_per_byte is None
    assert [measure.name for measure in unknown.measures] == ["loss", "perplexity"]


def test_a_real_model_on_real_text(shared: Path) -> None:
    """The folder's notes give 2.022 nats a token, from a dense float32 forward pass elsewhere, for the same windows."""
    folder = shared / "checkpoints" / "base14m-qwen2-gptq-w4g64-asym"
    with gzip.open(shared / "data" / "text" / "tinystories_sample.jsonl.gz", "rt", encoding="utf-8") as file:
        stories = [json.loads(next(file))["text"] for _ in range(60)]
    model, tokenizer = load_pretrained(folder, progress=False), load_tokenizer(folder)
    found = perplexity(model, tokenizer, " ".join(stories), window=512, limit=16, batch_size=4)
    assert len(found.units) == 16
    assert found.loss == pytest.approx(2.022, abs=6e-4)
