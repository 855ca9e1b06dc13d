"""Texts in the order of the prompts, each as if it were alone."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest

from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.generation import generate, generate_text
from lotaqaf_jax.models import Decoder, QuantSpec
from tests.generation.test_loop import LLAMA
from tests.models.tiny import quantized_decoder

PROMPTS = ["hello", "a", "the quick fox", "b", "some words", "the last"]


class Letters:
    """A tokenizer of 64 characters; token 0 is BOS and 1 is EOS."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return types.SimpleNamespace(input_ids=[0] * add_special_tokens + [2 + ord(char) % 62 for char in text])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(64 + i) for i in ids if not (skip_special_tokens and i < 2))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return quantized_decoder(LLAMA, QuantSpec(8, -1))


def write(model: Decoder, prompts: Sequence[Any] = PROMPTS, **settings: Any) -> list[str]:
    given: dict[str, Any] = {"max_new_tokens": 10, "progress": None} | settings
    return generate_text(model, Letters(), prompts, **given)  # type: ignore[arg-type]


def test_texts_are_those_of_each_prompt_alone_and_in_order(model: Decoder) -> None:
    texts = write(model, batch_size=4)
    assert len(set(texts)) == len(texts)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = Letters()(prompt).input_ids
        tokens = generate(model, [ids], [len(ids)], max_new_tokens=10, eos_token_id=1).tokens
        assert Letters().decode(tokens[0].tolist(), skip_special_tokens=True) == text
    assert write(model, PROMPTS[::-1], batch_size=3) == texts[::-1]


def test_draws_do_not_depend_on_the_batches(model: Decoder) -> None:
    few, many = (write(model, batch_size=size, temperature=1.5, seed=4) for size in (1, 4))
    assert few == many
    same = write(model, ["hello"] * 4, batch_size=4, temperature=1.5)
    assert len(set(same)) == 4, "a prompt that is given four times is continued in four ways"


def test_token_ids_are_taken_as_they_are(model: Decoder) -> None:
    ids = [Letters()(prompt).input_ids for prompt in PROMPTS]
    assert write(model, ids, batch_size=4) == write(model, batch_size=4)
    bare = [Letters()(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
    assert write(model, bare, batch_size=4) == write(model, batch_size=4, add_special_tokens=False)


def test_a_text_ends_at_eos_or_at_its_own_limit(model: Decoder) -> None:
    whole = write(model, batch_size=4)
    limits = (1, 2, 10, 4, 5, 6)
    cut = write(model, batch_size=4, max_new_tokens=limits)
    assert cut == [text[:limit] for text, limit in zip(whole, limits, strict=True)]
    stop = whole[2][3]
    assert write(model, batch_size=4, eos_token_id=ord(stop) - 64)[2] == whole[2][: whole[2].index(stop) + 1]


def test_nothing_to_write(model: Decoder) -> None:
    assert write(model, []) == []


def test_what_cannot_be_done_is_said_by_the_prompts_place(model: Decoder) -> None:
    with pytest.raises(DataError, match="prompt 2 is empty"):
        write(model, [[3], [4], []])
    with pytest.raises(DataError, match="prompt 1: 90 tokens and 10 new ones"):
        write(model, [[3], [4] * 90, [5]])
    with pytest.raises(ConfigError, match="batch_size: found 0"):
        write(model, batch_size=0)
