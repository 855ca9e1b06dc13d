"""Rows become examples; what cannot be used is named."""

from __future__ import annotations

import pytest

from lotaqaf_jax.data.formats import FORMATS, Chat, Completion, Message, Text, detect_format
from lotaqaf_jax.errors import DataError


def ask(question: str, answer: str) -> Chat:
    return Chat((Message("user", question), Message("assistant", answer)))


SQL_PROMPT = (
    "Write a SQL query to answer the question based on the table schema.\n\n"
    " context: CREATE TABLE t (a INTEGER)\n\n question: How many?"
)


@pytest.mark.parametrize(
    ("name", "row", "example"),
    [
        (
            "messages",
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
            ask("Hi", "Yo"),
        ),
        (
            "conversations",
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yo"},
                ]
            },
            Chat((Message("system", "Be kind."), *ask("Hi", "Yo").messages)),
        ),
        ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, ask("Add.\n\n1 2", "3")),
        ("alpaca", {"instruction": "Sing.", "input": "", "output": "La"}, ask("Sing.", "La")),
        ("alpaca", {"instruction": "Sing.", "input": None, "output": "La"}, ask("Sing.", "La")),
        ("alpaca", {"instruction": "Sing.", "output": "La"}, ask("Sing.", "La")),
        (
            "alpaca",
            {"instruction": "Sing.", "output": "La", "system": "You sing."},
            Chat((Message("system", "You sing."), *ask("Sing.", "La").messages)),
        ),
        ("prompt", {"prompt": "1 + 1 =", "completion": " 2"}, Completion("1 + 1 =", " 2")),
        (
            "sql",
            {
                "question": "How many?",
                "context": "CREATE TABLE t (a INTEGER)",
                "answer": "SELECT COUNT(*) FROM t",
            },
            ask(SQL_PROMPT, "SELECT COUNT(*) FROM t"),
        ),
        ("gsm8k", {"question": "1 + 1?", "answer": "#### 2"}, ask("1 + 1?", "#### 2")),
        ("text", {"text": "Once upon a time."}, Text("Once upon a time.")),
    ],
)
def test_the_columns_give_the_format_and_the_row_the_example(name, row, example):
    form = detect_format(row)
    assert form.name == name
    assert form.read(row) == example


@pytest.mark.parametrize(
    "row",
    [
        {"mr": "inform(name[Doom])", "ref": "Doom is a game."},
        {"meaning_representation": "inform(name[Doom])", "target": "Doom is a game."},
    ],
)
def test_viggo_asks_for_the_representation_of_the_sentence_in_both_editions(row):
    form = detect_format(row)
    user, assistant = form.read(row).messages
    assert form.name == "viggo"
    assert user.content.endswith("Doom is a game.")
    assert "inform" not in user.content
    assert assistant == Message("assistant", "inform(name[Doom])")


def test_where_several_formats_fit_the_first_is_taken_unless_one_is_named():
    columns = ("prompt", "completion", "messages", "text")
    assert detect_format(columns).name == "messages"
    assert detect_format(columns, ("text",)).name == "text"


def test_unknown_columns_are_named_with_those_of_each_format():
    with pytest.raises(DataError, match=r"unknown columns body, title; expected .*alpaca: instruction, output"):
        detect_format({"title": 1, "body": 2})


def test_unknown_format_is_named_with_those_known():
    with pytest.raises(DataError, match=f"unknown dataset format 'alpacca'; known are {', '.join(FORMATS)}"):
        detect_format(("text",), ("alpacca",))


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("alpaca", {"instruction": "a"}, "column 'output' is missing or null"),
        ("alpaca", {"instruction": "a", "output": None}, "column 'output' is missing or null"),
        ("alpaca", {"instruction": " ", "output": "b"}, "column 'instruction' is empty"),
        ("alpaca", {"instruction": "a", "output": 7}, "column 'output' holds int; expected a string"),
        ("alpaca", {"instruction": "a", "output": "b", "input": ["c"]}, "column 'input' holds list"),
        ("prompt", {"prompt": "a", "completion": ""}, "column 'completion' is empty"),
        ("prompt", {"prompt": [], "completion": "b"}, "column 'prompt' holds list"),
        ("text", {"text": ""}, "column 'text' is empty"),
        ("messages", {"messages": None}, "column 'messages' is missing or null"),
        ("messages", {"messages": "hello"}, "column 'messages' holds str; expected a list of turns"),
        ("messages", {"messages": ["hello"]}, "turn 1 is str; expected an object with 'role' and 'content'"),
        ("messages", turns("user", "robot"), "turn 2 has role 'robot'; known are system, user, assistant"),
        ("messages", {"messages": [{"content": "x"}]}, "turn 1 has role None"),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "turn 1 has role \\['user'\\]"),
        ("messages", {"messages": [{"role": "user"}]}, "turn 1: field 'content' is missing or null"),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, "turn 1: field 'content' holds int"),
        ("messages", turns("system", "user"), "has no assistant turn"),
        ("messages", {"messages": []}, "has no assistant turn"),
        ("messages", turns("system", "assistant", "user"), "begins with the assistant"),
        (
            "conversations",
            {"conversations": [{"from": "bot", "value": "x"}]},
            "has role 'bot'; known are human, gpt",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_column(name, row, message):
    form = detect_format([*row, "output"], (name,))
    with pytest.raises(DataError, match=message):
        form.read(row)
