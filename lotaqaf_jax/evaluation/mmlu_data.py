"""MMLU: its questions, the groups of its subjects, and the prompt.

The prompt is that of the benchmark's authors, with the subject's underscores as blanks::

    The following are multiple choice questions (with answers) about abstract algebra.

    <question>
    A. <choice>
    B. <choice>
    C. <choice>
    D. <choice>
    Answer: B

    <the next of the subject's five dev questions, and so on>

    <question>
    A. ...
    Answer:

Source: D. Hendrycks et al., "Measuring massive multitask language understanding" (arXiv 2009.03300), and the subjects'
categories in the code that goes with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lotaqaf_jax.data import Rows, load_rows
from lotaqaf_jax.data.sources import Row
from lotaqaf_jax.errors import DataError

__all__ = ["GROUPS", "LETTERS", "MmluData", "Question", "group_of", "load_mmlu", "mmlu_prompt"]

LETTERS = ("A", "B", "C", "D")

_HUB = "cais/mmlu:all"

GROUPS: Mapping[str, tuple[str, ...]] = {
    "STEM": (
        "abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "social sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "other": (
        "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
        "management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}  # fmt: skip
"""The 57 subjects by group, as the benchmark's authors have them: "other" holds the health sciences, with anatomy."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with four choices; ``answer`` is the index of the right one, ``where`` its place in the data."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    where: str


@dataclasses.dataclass(frozen=True)
class MmluData:
    """Questions to ask, and those to show before them.

    Attributes:
        name: what was read, for reports.
        questions: to ask, in file order.
        examples: to show, by subject, in file order; empty without shots.
        files: the files read; none for the hub's.
    """

    name: str
    questions: tuple[Question, ...]
    examples: Mapping[str, tuple[Question, ...]]
    files: tuple[Path, ...] = ()


def group_of(subject: str) -> str:
    """The group of a subject; subjects that are not among MMLU's 57 are "unknown"."""
    return next((group for group, subjects in GROUPS.items() if subject in subjects), "unknown")


def load_mmlu(dataset: str | None = None, split: str = "test", *, shots: int = 5) -> MmluData:
    """Read questions, and the examples to show from the split ``dev``.

    Args:
        dataset: a folder that holds ``test.*`` and ``dev.*`` (jsonl, parquet, ...), or a hub name with its subset; None
            for ``cais/mmlu:all``. Columns: subject, question, choices (four strings), answer (0 to 3 or A to D).
            A single file will do where no examples are shown.
        split: of the questions to ask.
        shots: how many examples are going to be shown.

    Raises:
        DataError: data that cannot be had or read, a row that is not of this form (with its place), or a subject that
            has fewer than ``shots`` examples.
    """
    name = dataset or _HUB
    if shots and Path(name).is_file():
        raise DataError(
            f"{name}: one file, which holds no examples to show. Give the folder that holds {split}.* and dev.*, or "
            "--shots 0."
        )
    asked = load_rows(name, split)
    shown = load_rows(name, "dev") if shots else Rows(name, (), ())
    questions = tuple(_question(row) for row in asked.rows)
    examples: dict[str, list[Question]] = {}
    for one in (_question(row) for row in shown.rows):
        examples.setdefault(one.subject, []).append(one)
    for subject in dict.fromkeys(one.subject for one in questions):
        if len(examples.get(subject, [])) < shots:
            raise DataError(
                f"{name}: {subject} has {len(examples.get(subject, []))} questions in dev, expected at least {shots} "
                "to show; lower --shots."
            )
    chosen = {subject: tuple(found[:shots]) for subject, found in examples.items()}
    return MmluData(name, questions, chosen, asked.files + shown.files)


def mmlu_prompt(question: Question, examples: Sequence[Question]) -> str:
    """The text before the answer's letter; it ends with ``Answer:``. The module's docstring shows it."""
    head = f"The following are multiple choice questions (with answers) about {question.subject.replace('_', ' ')}.\n\n"
    shown = "".join(f"{_asked(example)} {LETTERS[example.answer]}\n\n" for example in examples)
    return head + shown + _asked(question)


def _asked(question: Question) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=True))
    return f"{question.question.strip()}{choices}\nAnswer:"


def _question(row: Row) -> Question:
    values = row.values
    for column in ("subject", "question"):
        if not isinstance(values.get(column), str) or not values[column]:
            raise DataError(f"{row.where}: column {column!r} is {values.get(column)!r}; expected a string")
    choices = values.get("choices")
    if not isinstance(choices, list | tuple) or len(choices) != 4:
        raise DataError(f"{row.where}: column 'choices' is {choices!r}; expected a list of four strings")
    return Question(
        subject=values["subject"],
        question=values["question"],
        choices=tuple(str(choice) for choice in choices),  # type: ignore[arg-type]
        answer=_answer(values.get("answer"), row.where),
        where=row.where,
    )


def _answer(value: Any, where: str) -> int:
    if isinstance(value, str) and value.strip().upper() in LETTERS:
        return LETTERS.index(value.strip().upper())
    if isinstance(value, int | str) and str(value).strip() in ("0", "1", "2", "3") and not isinstance(value, bool):
        return int(value)
    raise DataError(f"{where}: column 'answer' is {value!r}; expected 0 to 3 or A to D")
