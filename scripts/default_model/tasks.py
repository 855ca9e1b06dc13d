"""The instruction tasks that the default model is pretrained on, and the one it is fine-tuned on."""

from __future__ import annotations

import random
from collections.abc import Collection

from default_model.orders import DEPARTMENTS, DETAILS, NEW_DEPARTMENT, draw_message, draw_order, plain

__all__ = ["Row", "draw_data", "draw_new_rows", "draw_pretraining_row", "tokenizer_corpus"]

Row = dict[str, str]
"""instruction, input, output."""

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")


def _row(instruction: str, given: str, output: str) -> Row:
    return {"instruction": instruction, "input": given, "output": output}


def _write_instruction(department: str) -> str:
    return f"Write the message for the {department}."


def draw_pretraining_row(rng: random.Random) -> Row:
    """One row of the pretraining corpus: mostly notations, some questions about a message."""
    order = draw_order(rng)
    message = draw_message(order, rng)
    draw = rng.random()
    departments = list(DEPARTMENTS)
    if draw < 0.6:
        department = rng.choice(departments)
        return _row(_write_instruction(department), message, DEPARTMENTS[department].write(order))
    if draw < 0.75:
        source, target = rng.sample(departments, 2)
        given = DEPARTMENTS[source].write(order)
        return _row(f"Copy the note for the {target}.", given, DEPARTMENTS[target].write(order))
    if draw < 0.85:
        detail = rng.choice(DETAILS)
        return _row(f"What is the {detail}?", message, order.get(detail) or "not given")
    if draw < 0.88:
        return _row("What does the customer want?", message, order.intent)
    if draw < 0.91:
        return _row("Which details are given?", message, ", ".join(detail for detail, _ in order.details))
    if draw < 0.93:
        return _row("How many details are given?", message, _NUMBERS[len(order.details) - 1])
    if draw < 0.97:
        return _row("Say it in short.", message, plain(order))
    return _row("Repeat the message.", message, message)


def draw_new_rows(rng: random.Random, count: int, *, without: Collection[str] = ()) -> list[Row]:
    """``count`` rows of the new task with different messages, none of them in ``without``.

    Args:
        rng: the generator.
        count: number of rows.
        without: messages that must not occur.
    """
    department, notation = NEW_DEPARTMENT
    seen = set(without)
    rows: list[Row] = []
    while len(rows) < count:
        order = draw_order(rng)
        message = draw_message(order, rng)
        if message not in seen:
            seen.add(message)
            rows.append(_row(_write_instruction(department), message, notation.write(order)))
    return rows


def draw_data(heldout: int, train: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Held-out and training rows of the new task, without a common message."""
    out = draw_new_rows(random.Random(f"heldout {seed}"), heldout)
    return out, draw_new_rows(random.Random(f"train {seed}"), train, without={row["input"] for row in out})


def tokenizer_corpus(rng: random.Random) -> list[str]:
    """Texts to train the tokenizer on: pretraining rows, and the new instruction, so that its words are tokens."""
    rows = [draw_pretraining_row(rng) for _ in range(20_000)]
    texts = [f"{row['instruction']}\n\n{row['input']}\n{row['output']}" for row in rows]
    return texts + [_write_instruction(NEW_DEPARTMENT[0])] * 500
