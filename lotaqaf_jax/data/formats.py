"""Rows with known columns become examples: a chat, a prompt with its completion, or plain text.

=============  ====================================  ==================================================
format         columns                               example
=============  ====================================  ==================================================
messages       messages: [{role, content}]           the chat as it is
conversations  conversations: [{from, value}]        the chat (ShareGPT: human, gpt, system)
alpaca         instruction, output; input, system    user: instruction, blank line, input; assistant: output
prompt         prompt, completion                    joined as they are, without a chat template
sql            question, context, answer             user: the question and the schema; assistant: the query
gsm8k          question, answer                      user: the question; assistant: the worked answer
viggo          mr, ref                               user: the sentence; assistant: its meaning representation
               (hub: meaning_representation, target)
text           text                                  the text
=============  ====================================  ==================================================

A format fits a dataset that has all its columns; columns after a semicolon may be missing. Where several fit,
the first in this table is taken. Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lotaqaf_jax.errors import DataError

__all__ = ["FORMATS", "Chat", "Completion", "Example", "Format", "Message", "Text", "detect_format"]

Row = Mapping[str, Any]


class Message(NamedTuple):
    """One turn of a chat; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A chat; the loss is on the assistant's turns."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    """A prompt and how it goes on; the loss is on the completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text; the loss is on all of it."""

    text: str


Example = Chat | Completion | Text


@dataclass(frozen=True)
class Format:
    """A named way to read a row.

    ``required`` are the columns it needs, ``optional`` those it uses when they are there, and ``read`` makes
    the example of a row, raising DataError with a sentence that names the column.
    """

    name: str
    required: tuple[str, ...]
    read: Callable[[Row], Example]
    optional: tuple[str, ...] = ()


def _string(row: Row, column: str) -> str:
    """The non-empty string in a column."""
    value = row.get(column)
    if value is None:
        raise DataError(f"column {column!r} is missing or null; expected a string")
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {type(value).__name__}; expected a string")
    if not value.strip():
        raise DataError(f"column {column!r} is empty; expected some text")
    return value


def _optional_string(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {type(value).__name__}; expected a string or nothing")
    return value


def _ask(question: str, answer: str) -> Chat:
    return Chat((Message("user", question), Message("assistant", answer)))


def _read_chat(row: Row, column: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Chat:
    turns = row.get(column)
    if turns is None:
        raise DataError(f"column {column!r} is missing or null; expected a list of turns")
    if not isinstance(turns, list):
        raise DataError(f"column {column!r} holds {type(turns).__name__}; expected a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise DataError(
                f"column {column!r}, turn {number} is {type(turn).__name__}; expected an object with "
                f"{role_key!r} and {text_key!r}"
            )
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"column {column!r}, turn {number} has role {role!r}; known are {', '.join(roles)}")
        try:
            messages.append(Message(roles[role], _string(turn, text_key)))
        except DataError as error:
            raise DataError(f"column {column!r}, turn {number}: {error}".replace(": column", ": field")) from None
    _check_order(messages, column)
    return Chat(tuple(messages))


def _check_order(messages: Sequence[Message], column: str) -> None:
    speakers = [message.role for message in messages if message.role != "system"]
    if "assistant" not in speakers:
        raise DataError(f"column {column!r} has no assistant turn; there is nothing to learn from it")
    if speakers[0] == "assistant":
        raise DataError(f"column {column!r} begins with the assistant; expected a user turn first")


_MESSAGES_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **_MESSAGES_ROLES}


def _read_messages(row: Row) -> Chat:
    return _read_chat(row, "messages", "role", "content", _MESSAGES_ROLES)


def _read_conversations(row: Row) -> Chat:
    return _read_chat(row, "conversations", "from", "value", _SHAREGPT_ROLES)


def _read_alpaca(row: Row) -> Chat:
    question, more = _string(row, "instruction"), _optional_string(row, "input")
    chat = _ask(f"{question}\n\n{more}" if more.strip() else question, _string(row, "output"))
    system = _optional_string(row, "system")
    return Chat((Message("system", system), *chat.messages)) if system.strip() else chat


def _read_prompt(row: Row) -> Completion:
    return Completion(_string(row, "prompt"), _string(row, "completion"))


def _read_sql(row: Row) -> Chat:
    # The wording is the dataset's own (its `messages` edition), so that both editions give the same prompt.
    question = (
        "Write a SQL query to answer the question based on the table schema.\n\n"
        f" context: {_string(row, 'context')}\n\n question: {_string(row, 'question')}"
    )
    return _ask(question, _string(row, "answer"))


def _read_gsm8k(row: Row) -> Chat:
    return _ask(_string(row, "question"), _string(row, "answer"))


def _read_viggo(row: Row) -> Chat:
    representation, sentence = ("mr", "ref") if "mr" in row else ("meaning_representation", "target")
    question = (
        "Write the meaning representation of the sentence: one function with attributes and their values.\n\n"
        f"Sentence: {_string(row, sentence)}"
    )
    return _ask(question, _string(row, representation))


def _read_text(row: Row) -> Text:
    return Text(_string(row, "text"))


_ALL = (
    Format("messages", ("messages",), _read_messages),
    Format("conversations", ("conversations",), _read_conversations),
    Format("alpaca", ("instruction", "output"), _read_alpaca, ("input", "system")),
    Format("prompt", ("prompt", "completion"), _read_prompt),
    Format("sql", ("question", "context", "answer"), _read_sql),
    Format("gsm8k", ("question", "answer"), _read_gsm8k),
    Format("viggo", ("mr", "ref"), _read_viggo),
    Format("viggo", ("meaning_representation", "target"), _read_viggo),
    Format("text", ("text",), _read_text),
)

FORMATS: tuple[str, ...] = tuple(dict.fromkeys(form.name for form in _ALL))
"""The names of all formats, in the order in which they are tried."""


def detect_format(columns: Collection[str], names: Collection[str] = FORMATS) -> Format:
    """The first format, of those called ``names``, whose required columns are all there.

    Raises:
        DataError: none fits, or a name is unknown; says the columns found and the columns of each format.
    """
    for name in names:
        if name not in FORMATS:
            raise DataError(f"unknown dataset format {name!r}; known are {', '.join(FORMATS)}")
    candidates = [form for form in _ALL if form.name in names]
    for form in candidates:
        if set(form.required) <= set(columns):
            return form
    wanted = "; ".join(f"{form.name}: {', '.join(form.required)}" for form in candidates)
    raise DataError(
        f"unknown columns {', '.join(sorted(columns)) or '(none)'}; expected those of one format ({wanted}). "
        "Rename the columns, or give another dataset"
    )
