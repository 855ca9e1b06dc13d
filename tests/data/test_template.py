"""The loss is on the assistant's turns, whatever the chat template looks like."""

from __future__ import annotations

import pytest

from lotaqaf_jax.data.formats import Chat, Completion, Message, Text
from lotaqaf_jax.data.template import Piece, TemplateRenderer
from lotaqaf_jax.errors import DataError
from tests.data.conftest import CHATML, byte_tokenizer

ONE = Chat((Message("user", "Hi"), Message("assistant", "Yo!")))
TWO = Chat(
    (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Yo!"),
        Message("user", "Hi"),
        Message("assistant", "Hi"),
    )
)

TEMPLATED = ["chatml", "llama3", "phi3", "bare"]


@pytest.fixture
def tokenizer(request):
    return request.getfixturevalue(request.param)


def losses(rendered) -> list[str]:
    return [piece.text for piece in rendered.pieces if piece.loss]


def text(rendered) -> str:
    return "".join(piece.text for piece in rendered.pieces)


def test_chatml_with_its_default_system_prompt(chatml):
    assert TemplateRenderer(chatml)(ONE).pieces == (
        Piece(
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        Piece("Yo!<|im_end|>", True),
    )


def test_llama3_with_its_date_which_does_not_depend_on_today(llama3):
    rendered = TemplateRenderer(llama3)(ONE)
    assert rendered.pieces[0].text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024"
    )
    assert rendered.pieces[0].text.endswith("Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert rendered.pieces[1:] == (Piece("Yo!<|eot_id|>", True),)
    assert not rendered.bos, "the template writes BOS itself"
    assert not rendered.eos, "the turn is closed already"


@pytest.mark.parametrize(
    ("tokenizer", "chat", "expected"),
    [
        ("chatml", TWO, ["Yo!<|im_end|>", "Hi<|im_end|>"]),
        ("llama3", TWO, ["Yo!<|eot_id|>", "Hi<|eot_id|>"]),
        ("phi3", TWO, ["Yo!<|end|>", "Hi<|end|>"]),
        ("bare", TWO, ["Yo!\n", "Hi\n"]),
        ("plain", TWO, ["Yo!</s>", "Hi</s>"]),
        ("llama2", ONE, [" Yo! </s>"]),
        ("llama2", Chat(TWO.messages[1:]), [" Yo! </s>", " Hi </s>"]),
    ],
    indirect=["tokenizer"],
)
def test_the_loss_is_on_each_answer_and_the_token_that_closes_it(tokenizer, chat, expected):
    assert losses(TemplateRenderer(tokenizer)(chat)) == expected


@pytest.mark.parametrize("chat", [ONE, TWO])
@pytest.mark.parametrize("tokenizer", TEMPLATED, indirect=True)
def test_the_pieces_are_the_template_text_up_to_the_end_of_the_last_answer(tokenizer, chat):
    whole = tokenizer.apply_chat_template(
        [message._asdict() for message in chat.messages], tokenize=False, date_string="26 Jul 2024"
    )
    rendered = TemplateRenderer(tokenizer)(chat)
    assert whole.startswith(text(rendered))
    assert whole[len(text(rendered)) :].strip() in ("", tokenizer.eos_token)


@pytest.mark.parametrize("tokenizer", TEMPLATED, indirect=True)
def test_what_precedes_an_answer_is_what_the_model_is_prompted_with(tokenizer):
    pieces = TemplateRenderer(tokenizer)(TWO).pieces
    for number, stop in ((1, 2), (3, 4)):
        prompt = tokenizer.apply_chat_template(
            [message._asdict() for message in TWO.messages[:stop]],
            tokenize=False,
            add_generation_prompt=True,
            date_string="26 Jul 2024",
        )
        assert "".join(piece.text for piece in pieces[:number]) == prompt


def test_a_template_without_a_closing_token_gets_eos_after_the_last_answer(bare):
    assert TemplateRenderer(bare)(TWO).eos


def test_turns_after_the_last_answer_are_left_out(chatml):
    longer = Chat((*ONE.messages, Message("user", "And then?")))
    assert TemplateRenderer(chatml)(longer) == TemplateRenderer(chatml)(ONE)


def test_an_answer_that_repeats_the_question_is_found_at_its_own_place(chatml):
    chat = Chat((Message("user", "Hi<|im_end|>\n"), Message("assistant", "Hi")))
    assert losses(TemplateRenderer(chatml)(chat)) == ["Hi<|im_end|>"]


def test_without_a_template_the_plain_form_is_used(plain):
    rendered = TemplateRenderer(plain)(TWO)
    assert text(rendered) == (
        "System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\nYo!</s>\n\nUser:\nHi\n\nAssistant:\nHi</s>"
    )
    assert rendered.bos
    assert not rendered.eos


def test_prompt_and_completion_are_joined_as_they_are_even_with_a_template(chatml, plain):
    pieces = (Piece("1 + 1 =", False), Piece(" 2", True))
    for tokenizer, bos in ((chatml, False), (plain, True)):
        rendered = TemplateRenderer(tokenizer)(Completion("1 + 1 =", " 2"))
        assert (rendered.pieces, rendered.bos, rendered.eos) == (pieces, bos, True)


def test_plain_text_is_all_loss(plain):
    rendered = TemplateRenderer(plain)(Text("Once"))
    assert rendered.pieces == (Piece("Once", True),)
    assert (rendered.bos, rendered.eos, rendered.has_source) == (True, True, False)


def test_a_template_that_refuses_the_chat_is_an_error(llama2):
    chat = Chat((Message("user", "a"), Message("user", "b"), Message("assistant", "c")))
    with pytest.raises(DataError, match="chat template refuses the chat: turns must alternate"):
        TemplateRenderer(llama2)(chat)


def test_a_template_that_changes_earlier_answers_is_an_error_only_where_it_does(forgetful):
    chat = Chat((*ONE.messages, Message("user", "Hi"), Message("assistant", "one!two")))
    with pytest.raises(DataError, match="renders turn 2, or what is before it, differently once more turns follow"):
        TemplateRenderer(forgetful)(chat)
    single = Chat((Message("user", "Hi"), Message("assistant", "one!two")))
    assert losses(TemplateRenderer(forgetful)(single)) == ["one!two<|im_end|>"]


def test_a_tokenizer_without_eos_is_an_error_where_eos_is_needed():
    render = TemplateRenderer(byte_tokenizer(None, eos=None))
    for example in (ONE, Text("Once"), Completion("a", "b")):
        with pytest.raises(DataError, match="no EOS token"):
            render(example)
    closes = byte_tokenizer(CHATML, eos=None, special=("<|im_start|>", "<|im_end|>"))
    assert losses(TemplateRenderer(closes)(ONE)) == ["Yo!<|im_end|>"]
