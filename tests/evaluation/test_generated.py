"""Exact match of generated texts, on the shipped model: the same rows as by one forward pass."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lotaqaf_jax.assets import DEFAULT_MODEL
from lotaqaf_jax.data import Limits, tokenize_examples
from lotaqaf_jax.data.formats import Chat, Message
from lotaqaf_jax.data.packing import Batch, collate
from lotaqaf_jax.evaluation import evaluate, generated_match
from lotaqaf_jax.models import Decoder, load_pretrained

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_pretrained(DEFAULT_MODEL, progress=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEFAULT_MODEL)


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> list[Chat]:
    """Six rows of what the model was pretrained on, and a chat of two turns."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from default_model.tasks import draw_pretraining_row

    rng = random.Random(3)
    turns = []
    for _ in range(8):
        row = draw_pretraining_row(rng)
        asked = Message("user", f"{row['instruction']}\n\n{row['input']}")
        turns.append((asked, Message("assistant", row["output"])))
    return [Chat(turn) for turn in turns[:6]] + [Chat(turns[6] + turns[7])]


def batches(tokenizer: Any, chats: list[Chat]) -> list[Batch]:
    """A row a batch, and one row of padding alone."""
    examples = tokenize_examples(tokenizer, chats, [str(i) for i in range(len(chats))], Limits(192), progress=False)
    rows = [[[i]] for i in range(len(chats))]
    return [collate(row, examples, batch_size=2, row_length=192, pad_id=tokenizer.pad_token_id) for row in rows]


def test_the_rows_that_match_are_those_of_one_forward_pass(model: Decoder, tokenizer: Any, chats: list[Chat]) -> None:
    rows = batches(tokenizer, chats)
    judged = [evaluate(model, [row]).exact_match == 1 for row in rows]
    assert any(judged)
    assert not all(judged)
    found = generated_match(model, tokenizer, rows, batch_size=8)
    assert list(found.matched) == judged
    assert found.exact_match == evaluate(model, rows).exact_match
    assert f"{100 * np.mean(judged):.1f} % of 7 rows" in str(found)
    # Every response of a chat is written, and compared with the text that the data holds.
    answers = [tuple(message.content for message in chat.messages if message.role == "assistant") for chat in chats]
    assert list(found.references) == answers
    assert [len(row) for row in found.responses] == [1] * 6 + [2]
    for match, written, wanted in zip(found.matched, found.responses, answers, strict=True):
        assert match == (written == wanted)


def test_no_target_at_all_is_refused(model: Decoder, tokenizer: Any, chats: list[Chat]) -> None:
    batch = batches(tokenizer, chats[:1])[0]
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no held-out row"):
        generated_match(model, tokenizer, [batch])
