"""Token ids, the loss mask and truncation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.data.formats import Chat, Completion, Message, Text
from lotaqaf_jax.data.sources import load_examples
from lotaqaf_jax.data.tokenize import IGNORE, Limits, end_of_turn_id, tokenize_examples, truncate
from lotaqaf_jax.errors import DataError
from tests.data.conftest import CHATML, byte_tokenizer

NO_LIMIT = Limits(100_000)


def chat(*contents: str) -> Chat:
    roles = ("user", "assistant")
    return Chat(tuple(Message(roles[index % 2], content) for index, content in enumerate(contents)))


def tokenize(tokenizer, *examples, limits=NO_LIMIT, **options):
    where = [f"row {number}" for number in range(1, len(examples) + 1)]
    return tokenize_examples(tokenizer, examples, where, limits, progress=False, **options)


def trained_text(tokenizer, example) -> str:
    return tokenizer.decode(example.labels[example.labels != IGNORE])


# --- the mask


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "Grüß dich!<|im_end|>🦆\nok<|im_end|>"),
        ("llama3", "Grüß dich!<|eot_id|>🦆\nok<|eot_id|>"),
        ("llama2", " Grüß dich! </s> 🦆\nok </s>"),
        ("phi3", "Grüß dich!<|end|>🦆\nok<|end|>"),
        ("bare", "Grüß dich!\n🦆\nok\n</s>"),
        ("plain", "Grüß dich!</s>🦆\nok</s>"),
    ],
)
def test_the_labels_decode_to_the_answers(request, name, expected):
    tokenizer = request.getfixturevalue(name)
    (example,) = tokenize(tokenizer, chat("Hallo äöü", "Grüß dich!", "🦆?", "🦆\nok"))
    assert trained_text(tokenizer, example) == expected


def test_labels_are_the_ids_where_there_is_a_loss(chatml):
    (example,) = tokenize(chatml, chat("a", "b"))
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    np.testing.assert_array_equal(example.labels, np.where(example.labels == IGNORE, IGNORE, example.input_ids))
    assert (example.labels != IGNORE).sum() == 2


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3", "llama2"])
def test_the_ids_are_those_of_the_template_text(request, name):
    tokenizer = request.getfixturevalue(name)
    messages = chat("Hallo äöü", "Grüß dich!")
    ids = tokenizer.apply_chat_template(
        [message._asdict() for message in messages.messages], date_string="26 Jul 2024", return_dict=False
    )
    (example,) = tokenize(tokenizer, messages)
    np.testing.assert_array_equal(example.input_ids, ids[: len(example.input_ids)])
    assert tokenizer.decode(ids[len(example.input_ids) :]).strip() in ("", tokenizer.eos_token)


@pytest.mark.parametrize("example", [Text("Once"), Completion("a", "b"), chat("a", "b"), chat("a", "b", "c", "d")])
@pytest.mark.parametrize("name", ["plain", "bare"])
def test_the_last_token_is_eos_once_and_in_the_loss_even_if_padding_is_eos(request, name, example):
    tokenizer = request.getfixturevalue(name)
    (one,) = tokenize(tokenizer, example)
    assert one.input_ids[-1] == one.labels[-1] == tokenizer.eos_token_id
    assert one.input_ids[-2] != tokenizer.eos_token_id


@pytest.mark.parametrize("example", [Text("Once</s>"), Completion("a", "b</s>")])
def test_eos_is_not_added_to_a_text_that_ends_with_it(plain, example):
    (one,) = tokenize(plain, example)
    assert (one.labels == plain.eos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("phi3", "<|end|>"),
        ("bare", "</s>"),
        ("plain", "</s>"),
    ],
)
def test_the_token_that_ends_a_turn(request, name, token):
    tokenizer = request.getfixturevalue(name)
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(token)


def test_bos_is_the_tokenizers_habit_and_never_in_the_loss(plain, chatml):
    (with_bos,), (without,) = tokenize(plain, Text("ab")), tokenize(chatml, Text("ab"))
    assert plain.decode(with_bos.input_ids) == "<s>ab</s>"
    assert trained_text(plain, with_bos) == "ab</s>"
    assert chatml.decode(without.input_ids) == "ab<|im_end|>"
    assert trained_text(chatml, without) == "b<|im_end|>", "nothing predicts the first token"


def test_a_token_across_the_edge_is_split_as_it_is_when_prompted():
    tokenizer = byte_tokenizer(merges=(("a", "b"),))
    assert tokenizer.convert_ids_to_tokens(tokenizer("xaby").input_ids) == ["x", "ab", "y"]
    (example,) = tokenize(tokenizer, Completion("xa", "by"))
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["x", "a", "b", "y", "</s>"]
    assert trained_text(tokenizer, example) == "by</s>"


def test_a_tokenizer_without_offsets_is_used_piece_by_piece():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    (example,) = tokenize(tokenizer, Completion("ä", "b"))
    assert tokenizer.decode(example.input_ids) == "äb</s>"
    assert trained_text(tokenizer, example) == "b</s>"


def test_unknown_tokens_are_counted(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "checkpoints" / "babyllama105-gptq-w3g32-asym")
    assert tokenize(tokenizer, Text("a\nb\nc"), Text("abc")).unknown_tokens == 2


def test_a_row_that_the_template_refuses_is_named_or_left_out(llama2):
    refused = Chat((Message("system", "x"), *chat("a", "b").messages))
    result = tokenize(llama2, chat("a", "b"), refused, skip_bad=True)
    assert (result.where, result.dropped) == (("row 1",), 0)
    assert len(result.skipped) == 1
    assert result.skipped[0].startswith("row 2: the tokenizer's chat template refuses")
    with pytest.raises(DataError, match="none of the 1 examples can be used; the first: row 1: the tokenizer's"):
        tokenize(llama2, refused, skip_bad=True)
    with pytest.raises(DataError, match="row 2: the tokenizer's chat template refuses"):
        tokenize(llama2, chat("a", "b"), refused)


# --- truncation

S, T = False, True


def cut(loss: list[bool], *limits: int | None, **options):
    """Truncate tokens 0, 1, 2, ...; gives the tokens kept and the two flags."""
    result = truncate(np.arange(len(loss), dtype=np.int32), np.asarray(loss), Limits(*limits), **options)
    np.testing.assert_array_equal(result.loss, np.asarray(loss)[result.input_ids])
    return result.input_ids.tolist(), result.source_cut, result.target_cut


@pytest.mark.parametrize(
    ("loss", "limits", "expected"),
    [
        ([S] * 4 + [T] * 3, (9, None, None), ([0, 1, 2, 3, 4, 5, 6], False, False)),
        ([S] * 4 + [T] * 3, (9, 2, None), ([2, 3, 4, 5, 6], True, False)),
        ([S] * 4 + [T] * 3, (9, None, 2), ([0, 1, 2, 3, 4, 5], False, True)),
        ([S] * 4 + [T] * 3, (9, 3, 1), ([1, 2, 3, 4], True, True)),
        # The whole is too long: the source gives way, down to half of the row, then the target.
        ([S] * 6 + [T] * 2, (6, None, None), ([2, 3, 4, 5, 6, 7], True, False)),
        ([S] * 6 + [T] * 6, (6, None, None), ([3, 4, 5, 6, 7, 8], True, True)),
        ([S] * 2 + [T] * 6, (6, None, None), ([0, 1, 2, 3, 4, 5], False, True)),
        # What follows the last target teaches nothing.
        ([S, T, S, S], (9, None, None), ([0, 1], False, False)),
        # Several turns: a cut target ends the example; so does a source that has no room.
        ([S, T, T, T, S, T], (9, None, 2), ([0, 1, 2], False, True)),
        ([S, T, S, T, T, T], (5, None, None), ([0, 1, 2, 3, 4], False, True)),
        ([S, T, S, S, T], (4, None, None), ([0, 1], True, False)),
        ([S, T, S, S, S, T], (9, 2, None), ([0, 1], True, False)),
        ([S] * 5, (9, None, None), ([], False, False)),
    ],
)
def test_truncation(loss, limits, expected):
    assert cut(loss, *limits) == expected


def test_bos_stays_in_front_of_a_cut_source():
    assert cut([S] * 5 + [T], 9, 3, bos=0) == ([0, 3, 4, 5], True, False)
    assert cut([S] * 5 + [T], 9, 3, bos=7) == ([2, 3, 4, 5], True, False)
    assert cut([S] * 5 + [T], 9, 1, bos=0) == ([4, 5], True, False)


def test_plain_text_keeps_its_beginning():
    assert cut([S] + [T] * 5, 4, 1, 1, has_source=False) == ([0, 1, 2, 3], False, True)
    assert cut([S] + [T] * 3, 4, 1, 1, has_source=False) == ([0, 1, 2, 3], False, False)


@given(
    turns=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    whole=st.integers(2, 60),
    source=st.none() | st.integers(1, 12),
    target=st.none() | st.integers(1, 12),
)
def test_truncation_keeps_to_its_limits_and_always_leaves_something_to_learn(turns, whole, source, target):
    loss = [mask for a, b in turns for mask in [S] * a + [T] * b]
    ids, source_cut, target_cut = cut(loss, whole, source, target)
    kept = np.asarray(loss)[ids]
    runs = np.split(kept, np.flatnonzero(np.diff(kept)) + 1)
    assert len(ids) <= whole
    assert all(len(run) <= (target if run[0] else source) for run in runs if (target if run[0] else source))
    assert kept.any()
    assert kept[-1], "an example ends with its last response"
    assert ids == list(range(ids[0], ids[-1] + 1)), "without BOS, what is kept is one stretch"
    assert (ids == list(range(len(loss)))) == (not source_cut and not target_cut)
    if not target_cut:
        assert ids[-1] + 1 in np.cumsum([a + b for a, b in turns]), "the end token of the last response stays"


def test_truncated_examples_are_counted_and_those_without_a_label_dropped(plain):
    examples = [chat("q" * 50, "a"), chat("q", "a" * 50), chat("q", "a")]
    result = tokenize(plain, *examples, limits=Limits(100, 40, 10))
    assert (result.truncated_sources, result.truncated_targets, result.dropped) == (1, 1, 0)
    assert [trained_text(plain, example) for example in result] == ["a</s>", "a" * 10, "a</s>"]
    assert plain.decode(result[0].input_ids).startswith("<s>qqq")
    assert plain.decode(result[0].input_ids).endswith("Assistant:\na</s>")


def test_an_example_without_a_label_is_dropped_and_only_such_examples_are_an_error(chatml):
    # One token of text: it is the first, which nothing predicts, and with one token allowed EOS is cut off.
    result = tokenize(chatml, Completion("ab", "c"), Text("a"), limits=Limits(3))
    assert (result.dropped, result.where) == (0, ("row 1", "row 2"))
    result = tokenize(chatml, Completion("ab", "c"), Text("a"), limits=Limits(1))
    assert result.dropped == 1
    with pytest.raises(DataError, match="all 2 examples have every label masked: after truncation to 1 tokens"):
        tokenize(chatml, Text("abc"), Text("a"), limits=Limits(1))


# --- real tokenizers and data


@pytest.mark.parametrize(
    ("checkpoint", "ending"),
    [("base14m-qwen2-gptq-w4g64-asym", "<|im_end|>"), ("babyllama105-gptq-w3g32-asym", "</s>")],
)
def test_real_rows_with_real_tokenizers(shared, checkpoint, ending):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "checkpoints" / checkpoint)
    source = load_examples(str(shared / "data" / "viggo"), max_samples=50)
    result = tokenize_examples(tokenizer, source.examples, source.where, NO_LIMIT, progress=False)
    assert len(result) == 50
    for example, chat_ in zip(result, source.examples, strict=True):
        answer = chat_.messages[-1].content
        if tokenizer.chat_template is None:
            # Character level, with its own marks for spaces and characters that it does not know.
            (answer,) = tokenizer.batch_decode([tokenizer(answer).input_ids], skip_special_tokens=False)
            answer = answer.removeprefix("<s>").lstrip()
        assert trained_text(tokenizer, example).lstrip() == answer + ending
        prompt = example.input_ids[: np.flatnonzero(example.labels != IGNORE)[0]]
        if tokenizer.chat_template is not None:
            expected = tokenizer.apply_chat_template(
                [chat_.messages[0]._asdict()], add_generation_prompt=True, return_dict=False
            )
            np.testing.assert_array_equal(prompt, expected)


def test_chatml_is_used_only_through_the_template():
    # The same tokens, another template: nothing about ChatML is built in.
    shout = CHATML.replace("m.content", "m.content|upper")
    tokenizer = byte_tokenizer(shout, eos="<|im_end|>", special=("<|im_start|>",))
    (example,) = tokenize(tokenizer, chat("a", "B"))
    assert "user\nA<|im_end|>" in tokenizer.decode(example.input_ids)
