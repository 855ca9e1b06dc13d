"""Exact match of generated texts, on the shipped model: the same rows as by one forward pass."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lotaqaf_jax.assets import DEFAULT_MODEL
from lotaqaf_jax.data import Examples, Limits, tokenize_examples
from lotaqaf_jax.data.formats import Chat, Message, Text
from lotaqaf_jax.data.packing import Batch, collate
from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.evaluation import Rule, Share, evaluate, exact_match, generated_match
from lotaqaf_jax.generation import generate_text
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


def as_examples(chats: list[Any]) -> Examples:
    return Examples("chats", "messages", (), tuple(chats), tuple(f"row {i}" for i in range(len(chats))))


def test_exact_match_asks_in_the_words_of_training(model: Decoder, tokenizer: Any, chats: list[Chat]) -> None:
    """The prompt is the chat template's, up to the last answer; the response is what the model goes on with."""
    found = exact_match(model, tokenizer, as_examples(chats), max_new_tokens=80, batch_size=4)
    prompts = [
        tokenizer.apply_chat_template(
            [message._asdict() for message in chat.messages[:-1]], tokenize=False, add_generation_prompt=True
        )
        for chat in chats
    ]
    assert [answer.prompt for answer in found.answers] == prompts
    # Stopped where a turn ends, which is this tokenizer's EOS.
    texts = generate_text(
        model, tokenizer, prompts, max_new_tokens=80, batch_size=4, add_special_tokens=False, progress=None
    )
    assert [answer.response for answer in found.answers] == texts
    assert [answer.reference for answer in found.answers] == [chat.messages[-1].content for chat in chats]
    right = [answer.response == answer.reference for answer in found.answers]
    assert [answer.correct for answer in found.answers] == right
    assert 0 < sum(right) < len(right)
    assert found.exact_match == found.same_text == Share(sum(right), len(right))
    assert json.loads(json.dumps(found.records()))[0]["where"] == "row 0"


def test_a_rule_of_ones_own(model: Decoder, tokenizer: Any, chats: list[Chat]) -> None:
    """By the first word more rows match than by the whole text, which is counted beside."""
    first = Rule("first word", "a word", lambda text: text.split()[0] if text.split() else None)
    found = exact_match(model, tokenizer, as_examples(chats), first, max_new_tokens=80, batch_size=4)
    expected = [a.response.split()[:1] == a.reference.split()[:1] for a in found.answers]
    assert [answer.correct for answer in found.answers] == expected
    assert found.exact_match.correct > found.same_text.correct


def test_long_prompts_lose_their_beginning(model: Decoder, tokenizer: Any, chats: list[Chat]) -> None:
    whole = exact_match(model, tokenizer, as_examples(chats), max_new_tokens=80, batch_size=4)
    cut = exact_match(model, tokenizer, as_examples(chats), max_new_tokens=1, max_source_length=20)
    lengths = [len(tokenizer(answer.prompt).input_ids) for answer in whole.answers]
    assert (whole.cut_prompts, cut.cut_prompts) == (0, sum(length > 20 for length in lengths))
    assert cut.cut_prompts > 0
    for one, other in zip(whole.answers, cut.answers, strict=True):
        assert tokenizer(one.prompt).input_ids[-20:] == tokenizer(other.prompt).input_ids
    # A context that leaves 12 tokens for the prompt cuts as a limit of 12 does.
    room = model.config.max_position_embeddings
    assert exact_match(model, tokenizer, as_examples(chats[:1]), max_new_tokens=room - 12).cut_prompts == 1
    with pytest.raises(ConfigError, match=f"max_new_tokens: found {room}"):
        exact_match(model, tokenizer, as_examples(chats), max_new_tokens=room)


def test_rows_that_a_rule_cannot_judge(model: Decoder, tokenizer: Any, chats: list[Chat]) -> None:
    with pytest.raises(DataError, match="row 0: the reference does not hold the number after ####"):
        exact_match(model, tokenizer, as_examples(chats), "gsm8k")
    with pytest.raises(DataError, match="row 0: plain text has no response"):
        exact_match(model, tokenizer, as_examples([Text("a")]))
    with pytest.raises(ConfigError, match="rule: found 'gsm', expected one of gsm8k"):
        exact_match(model, tokenizer, as_examples(chats), "gsm")
