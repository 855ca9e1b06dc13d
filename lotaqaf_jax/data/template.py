"""Examples become text cut into pieces, each with or without loss.

A chat goes through the tokenizer's own chat template. Where an assistant turn begins and ends is found by
rendering the chat up to that turn, with the generation prompt, and up to its end, and both must be how the
whole begins. So no template needs marks of ours, and what the model is trained to continue is what it will be
asked to continue.

The loss is on the text of an assistant turn and the token that closes it (``<|im_end|>``, ``<|eot_id|>``),
not on white space that the template puts after that token. If the template closes the last turn with no
special token, the tokenizer's EOS is added.

Without a chat template a chat is written in this plain form, with EOS after every response::

    System:
    ...

    User:
    ...

    Assistant:
    ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lotaqaf_jax.data.formats import Chat, Completion, Example, Message
from lotaqaf_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Piece", "Rendered", "TemplateRenderer"]

# Some templates write today's date into the system prompt. Given here, it is the one that the Llama 3
# templates fall back to themselves, and a run does not depend on the day on which it was started.
_TEMPLATE_OPTIONS: dict[str, Any] = {"date_string": "26 Jul 2024"}


class Piece(NamedTuple):
    """A stretch of text and whether its tokens are in the loss."""

    text: str
    loss: bool


@dataclass(frozen=True)
class Rendered:
    """The text of an example, in pieces.

    Attributes:
        pieces: the stretches of text, none empty.
        bos: whether the tokenizer's BOS goes before it (a chat template writes its own).
        eos: whether the tokenizer's EOS goes behind it, in the loss.
        has_source: whether there is a prompt that the source limit applies to (not in plain text).
    """

    pieces: tuple[Piece, ...]
    bos: bool
    eos: bool
    has_source: bool = True


class TemplateRenderer:
    """Renders examples for one tokenizer.

    Args:
        tokenizer: a Transformers tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple(dict.fromkeys([*special, *filter(None, [tokenizer.eos_token])]))
        # Whether plain text begins with BOS is the tokenizer's own habit.
        first = tokenizer("a", verbose=False).input_ids[:1]
        self._adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]

    def __call__(self, example: Example) -> Rendered:
        """The pieces of an example.

        Raises:
            DataError: the template refuses the chat, or does not repeat earlier turns as they were; or an EOS
                is needed and the tokenizer has none.
        """
        if isinstance(example, Chat):
            messages = _until_last_answer(example.messages)
            return self._render_chat(messages) if self._tokenizer.chat_template else self._render_plain(messages)
        self._require_eos()
        if isinstance(example, Completion):
            pieces = (Piece(example.prompt, False), Piece(example.completion, True))
            return Rendered(pieces, bos=self._adds_bos, eos=True)
        return Rendered((Piece(example.text, True),), bos=self._adds_bos, eos=True, has_source=False)

    def _render_chat(self, messages: Sequence[Message]) -> Rendered:
        whole = self._apply(messages)
        pieces: list[Piece] = []
        cursor = 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._apply(messages[:index], add_generation_prompt=True)
            turn = whole[len(prompt) :]
            if index + 1 < len(messages):
                # Up to where both agree: a chat that ends here may have a closing that the whole has later.
                agreed = _common_length(whole, self._apply(messages[: index + 1]))
                turn = whole[len(prompt) : max(agreed, len(prompt))]
            if not whole.startswith(prompt) or message.content.strip() not in turn:
                raise DataError(
                    f"the tokenizer's chat template renders turn {index + 1}, or what is before it, "
                    "differently once more turns follow, so the loss cannot be put on it; give chats with "
                    "one assistant turn, or another template"
                )
            turn = self._until_end_token(turn, message.content.strip())
            pieces += [Piece(whole[cursor : len(prompt)], False), Piece(turn, True)]
            cursor = len(prompt) + len(turn)
        closed = pieces[-1].text.endswith(self._special)
        if not closed:
            self._require_eos()
        return Rendered(_without_empty(pieces), bos=False, eos=not closed)

    def _render_plain(self, messages: Sequence[Message]) -> Rendered:
        self._require_eos()
        pieces: list[Piece] = []
        source = ""
        for message in messages:
            source += f"{message.role.capitalize()}:\n"
            if message.role == "assistant":
                pieces += [
                    Piece(source, False),
                    Piece(message.content + str(self._tokenizer.eos_token), True),
                ]
                source = "\n\n"
            else:
                source += f"{message.content}\n\n"
        return Rendered(_without_empty(pieces), bos=self._adds_bos, eos=False)

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        chat: list[dict[str, Any]] = [message._asdict() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt, **_TEMPLATE_OPTIONS
            )
        except TemplateError as error:
            raise DataError(f"the tokenizer's chat template refuses the chat: {error}") from error
        return str(text)

    def _until_end_token(self, turn: str, content: str) -> str:
        """A turn up to the special token that closes it, if there is one."""
        end = turn.index(content) + len(content)
        behind = turn[end:].lstrip()
        for token in self._special:
            if behind.startswith(token):
                return turn[: len(turn) - len(behind) + len(token)]
        # Something else stands between the content and the closing token, or there is no such token.
        stripped = turn.rstrip()
        return stripped if stripped.endswith(self._special) else turn

    def _require_eos(self) -> None:
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no EOS token, so the model cannot learn where to stop; set eos_token in "
                "its tokenizer_config.json"
            )


def _until_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages without those behind the last assistant turn, from which nothing is learned."""
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    return messages[: last + 1]


def _common_length(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _without_empty(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    return tuple(piece for piece in pieces if piece.text)
