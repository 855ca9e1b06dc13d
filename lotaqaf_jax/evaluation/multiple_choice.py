"""Which of four letters a model finds likeliest: MMLU by option likelihood."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.evaluation.intervals import Measure, Share
from lotaqaf_jax.evaluation.likelihood import next_token_scores
from lotaqaf_jax.evaluation.mmlu_data import GROUPS, LETTERS, MmluData, Question, group_of, mmlu_prompt
from lotaqaf_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Choice", "Mmlu", "mmlu"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What came of one question.

    Attributes:
        question: the question.
        shots: examples that were shown.
        truncated: whether the prompt lost its beginning even without examples.
        scores: log-probability of A, B, C and D.
    """

    question: Question
    shots: int
    truncated: bool
    scores: tuple[float, ...]

    @property
    def chosen(self) -> int:
        """The likeliest letter's index; of equals the first."""
        return int(np.argmax(self.scores))

    @property
    def correct(self) -> bool:
        """Whether it is the answer's."""
        return self.chosen == self.question.answer


@dataclasses.dataclass(frozen=True)
class Mmlu:
    """Result on MMLU.

    Attributes:
        choices: for each question what came of it, in the order of the data.
        shots: examples that were to be shown.
    """

    choices: tuple[Choice, ...]
    shots: int

    @property
    def accuracy(self) -> Share:
        """Over all questions, each counted once: the average that the benchmark's authors report."""
        return _share(self.choices)

    @property
    def subjects(self) -> Mapping[str, Share]:
        """By subject."""
        names = dict.fromkeys(choice.question.subject for choice in self.choices)
        return {name: _share([c for c in self.choices if c.question.subject == name]) for name in names}

    @property
    def groups(self) -> Mapping[str, Share]:
        """By group of subjects, each question counted once."""
        found = {
            name: [c for c in self.choices if group_of(c.question.subject) == name] for name in (*GROUPS, "unknown")
        }
        return {name: _share(choices) for name, choices in found.items() if choices}

    @property
    def subject_mean(self) -> float:
        """The mean of the subjects' shares, each subject counted once."""
        return float(np.mean([share.value for share in self.subjects.values()]))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The numbers of this result: all, the groups, the mean over subjects, the subjects."""
        subjects = self.subjects
        return (
            Measure.of("accuracy", self.accuracy, "questions"),
            *(Measure.of(f"accuracy/{name}", share, "questions") for name, share in self.groups.items()),
            Measure("subject_mean", self.subject_mean, None, len(subjects), "subjects", is_share=True),
            *(Measure.of(f"accuracy/{name}", share, "questions", detail=True) for name, share in subjects.items()),
        )

    @property
    def counts(self) -> dict[str, int]:
        """What else there is to know."""
        return {
            "questions": len(self.choices),
            "shots": self.shots,
            "questions_with_fewer_shots": sum(choice.shots < self.shots for choice in self.choices),
            "shots_dropped": sum(self.shots - choice.shots for choice in self.choices),
            "truncated_questions": sum(choice.truncated for choice in self.choices),
        }

    def records(self) -> list[dict[str, Any]]:
        """One row a question."""
        return [
            {
                "where": choice.question.where,
                "subject": choice.question.subject,
                "question": choice.question.question,
                "answer": LETTERS[choice.question.answer],
                "chosen": LETTERS[choice.chosen],
                "correct": choice.correct,
                "log_probs": dict(zip(LETTERS, choice.scores, strict=True)),
                "shots": choice.shots,
                "truncated": choice.truncated,
            }
            for choice in self.choices
        ]

    def __str__(self) -> str:
        return f"MMLU {self.shots}-shot: {self.accuracy}"


def mmlu(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    data: MmluData,
    *,
    shots: int = 5,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> Mmlu:
    """Answer every question with the letter that is likeliest to follow its prompt.

        argmax over A, B, C, D of log softmax(model(prompt))[letter]

    The prompt (:func:`.mmlu_prompt`) is tokenized as a text of its own, with the tokenizer's own special tokens and
    without a chat template. A letter is the token that it becomes behind ``Answer:`` and a blank. Where a prompt is
    longer than ``max_length``, examples are dropped from the front, and where that is not enough, the prompt's first
    tokens; both are counted. What the prompts of a subject have in common is computed once.

    Args:
        model: base, adapted or merged.
        tokenizer: the model's.
        data: from :func:`.load_mmlu`.
        shots: examples to show before each question.
        limit: only the first so many questions of every subject.
        max_length: most tokens of a prompt; None for the model's context.
        batch_size: questions that are computed together.
        progress: title of a progress bar, or None for none.

    Raises:
        DataError: the tokenizer does not make one token of each letter, or a subject has too few examples.
        ConfigError: a setting out of range.
    """
    most = model.config.max_position_embeddings
    room = most if max_length is None else max_length
    if not 8 <= room <= most:
        raise ConfigError(f"max_length: found {max_length}, expected 8 to {most}, the model's max_position_embeddings.")
    if shots < 0 or (limit is not None and limit < 1):
        raise ConfigError(f"shots and limit: found {shots} and {limit}, expected 0 or more, and 1 or more.")
    by_subject: dict[str, list[int]] = {}
    for place, question in enumerate(data.questions):
        asked = by_subject.setdefault(question.subject, [])
        if limit is None or len(asked) < limit:
            asked.append(place)
    found: dict[int, Choice] = {}
    total = sum(len(places) for places in by_subject.values())
    with tqdm(total=total, desc=progress, unit="question", leave=False, disable=progress is None) as bar:
        for subject, places in by_subject.items():
            examples = data.examples.get(subject, ())[:shots]
            if len(examples) < shots:
                raise DataError(f"{subject}: {len(examples)} examples to show, expected {shots}; lower --shots.")
            questions = [data.questions[place] for place in places]
            letters, prompts = _encode(tokenizer, questions, examples, room)
            # Prompts that show as many examples have their beginning in common.
            for shown in sorted({prompt.shots for prompt in prompts}):
                alike = [i for i, prompt in enumerate(prompts) if prompt.shots == shown]
                scores = next_token_scores(
                    model, [prompts[i].ids for i in alike], letters, batch_size=batch_size, progress=bar
                )
                for i, row in zip(alike, scores, strict=True):
                    one = Choice(questions[i], shown, prompts[i].truncated, tuple(float(score) for score in row))
                    found[places[i]] = one
    return Mmlu(tuple(found[place] for place in sorted(found)), shots)


def _share(choices: Sequence[Choice]) -> Share:
    return Share(sum(choice.correct for choice in choices), len(choices))


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """Token ids, the examples in them, and whether their beginning was cut."""

    ids: list[int]
    shots: int
    truncated: bool


def _encode(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], examples: Sequence[Question], room: int
) -> tuple[list[int], list[_Prompt]]:
    """The letters' tokens, and every prompt with as many examples as there is room for."""
    letters = _letters(tokenizer, mmlu_prompt(questions[0], ()))
    bos = tokenizer.bos_token_id
    prompts: dict[int, _Prompt] = {}
    left = list(range(len(questions)))
    for dropped in range(len(examples) + 1):
        texts = [mmlu_prompt(questions[i], examples[dropped:]) + f" {LETTERS[0]}" for i in left]
        encoded = tokenizer(texts, verbose=False).input_ids if texts else []
        again = []
        for i, ids in zip(left, encoded, strict=True):
            if ids[-1] != letters[0]:
                raise DataError(f"{questions[i].where}: its prompt makes another token of the letter A than others do.")
            ids = [int(token) for token in ids[:-1]]
            cut = len(ids) > room
            if cut and dropped < len(examples):
                again.append(i)
                continue
            if cut:
                ids = [ids[0], *ids[1 - room :]] if bos is not None and ids[0] == bos else ids[-room:]
            prompts[i] = _Prompt(ids, len(examples) - dropped, cut)
        left = again
    return letters, [prompts[i] for i in range(len(questions))]


def _letters(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token of each letter behind a prompt.

    Raises:
        DataError: the letters are not single tokens that differ from each other behind the same tokens.
    """
    encoded = tokenizer([f"{prompt} {letter}" for letter in LETTERS], verbose=False).input_ids
    before = {tuple(ids[:-1]) for ids in encoded}
    last = [int(ids[-1]) for ids in encoded]
    if len(before) > 1 or len(set(last)) < len(LETTERS):
        raise DataError(
            f"behind 'Answer:' the tokenizer makes {[ids[-3:] for ids in encoded]} of the letters (last three "
            "tokens of each), expected one token for each letter behind the same ones; this model cannot be asked MMLU."
        )
    return last
