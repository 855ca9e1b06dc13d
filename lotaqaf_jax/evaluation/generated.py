"""Exact match of texts: what the model writes against what it should have written.

Prompts come out of the same rendering and tokenizing as in training (:mod:`lotaqaf_jax.data`), so that a model is asked
in just the tokens that it was trained on: the tokenizer's chat template, or the plain form where it has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lotaqaf_jax.data import IGNORE, Chat, Completion, Example, Examples, Limits, end_of_turn_id, tokenize_examples
from lotaqaf_jax.data.tokenize import truncate
from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.evaluation.intervals import Measure, Share
from lotaqaf_jax.evaluation.rules import RULES, Rule
from lotaqaf_jax.generation import generate_text
from lotaqaf_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "ExactMatch", "GeneratedMatch", "exact_match", "generated_match"]

# No example is cut to length before its prompt is told from its response.
_NO_LIMIT = Limits(2**31 - 1)


@dataclasses.dataclass(frozen=True)
class GeneratedMatch:
    """Result on held-out rows.

    Attributes:
        exact_match: share of rows whose every response is the reference, white space at either end aside.
        matched: for each row whether it is one of them.
        responses: for each row what was written, one text for each response in the row.
        references: for each row what should have been.
    """

    exact_match: float
    matched: tuple[bool, ...]
    responses: tuple[tuple[str, ...], ...]
    references: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return f"exact match {100 * self.exact_match:.1f} % of {len(self.matched)} rows, generated"


def generated_match(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Mapping[str, Any]],
    *,
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int = 16,
    progress: str | None = None,
) -> GeneratedMatch:
    """Let the model write every response of the rows, greedily, and compare the texts.

    Beside :func:`lotaqaf_jax.evaluation.evaluate`, which tells from one forward pass whether greedy generation would
    give every token of the reference. This compares texts: other tokens of the same text match here and not there,
    and a model that would write past the reference's length is stopped at it.

    Args:
        model: base, adapted or merged.
        tokenizer: the model's.
        batches: each a dict of (batch, length) arrays, of one example a row (see docs/architecture.md). A response is
            a run of targets; everything before it in the row is its prompt, so a chat of several turns is asked turn
            by turn, the earlier ones as the reference has them. Rows without a target are not counted.
        eos_token_id: the token, or tokens, that end a response; None for the one that the chat template ends a turn
            with.
        batch_size: responses that are generated together.
        progress: title of a progress bar, or None for none.

    Raises:
        ValueError: no row has a target.
        DataError: prompt and response together do not fit into the model's context.
    """
    rows = [
        (ids, spans)
        for batch in batches
        for ids, labels in zip(np.asarray(batch["input_ids"]), np.asarray(batch["labels"]), strict=True)
        if (spans := _runs(labels != IGNORE))
    ]
    if not rows:
        raise ValueError("no held-out row has a target token to generate")
    asked = [(ids[:start].tolist(), ids[start:stop].tolist()) for ids, spans in rows for start, stop in spans]
    written = generate_text(
        model,
        tokenizer,
        [prompt for prompt, _ in asked],
        max_new_tokens=[len(reference) for _, reference in asked],
        batch_size=batch_size,
        eos_token_id=end_of_turn_id(tokenizer) if eos_token_id is None else eos_token_id,
        progress=progress,
    )
    found = iter(written)
    wanted = iter(str(tokenizer.decode(reference, skip_special_tokens=True)) for _, reference in asked)
    responses = tuple(tuple(next(found) for _ in spans) for _, spans in rows)
    references = tuple(tuple(next(wanted) for _ in spans) for _, spans in rows)
    matched = tuple(
        all(one.strip() == other.strip() for one, other in zip(*row, strict=True))
        for row in zip(responses, references, strict=True)
    )
    return GeneratedMatch(sum(matched) / len(matched), matched, responses, references)


def _runs(marked: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one row.

    Attributes:
        where: the place of the row.
        prompt: what the model was given, special tokens and all.
        reference: the response that the row holds.
        response: what the model wrote.
        expected: what the rule reads in the reference.
        found: what it reads in the response; None where it cannot read it.
    """

    where: str
    prompt: str
    reference: str
    response: str
    expected: str
    found: str | None

    @property
    def correct(self) -> bool:
        """Whether the response says what the reference says."""
        return self.found == self.expected


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Result of greedy generation, compared by a rule.

    Attributes:
        rule: the rule's name.
        answers: for each row what came of it.
        cut_prompts: rows whose prompt lost its beginning.
        max_new_tokens: most tokens that the model could write.
    """

    rule: str
    answers: tuple[Answer, ...]
    cut_prompts: int
    max_new_tokens: int

    @property
    def exact_match(self) -> Share:
        """Rows that are right by the rule."""
        return Share(sum(answer.correct for answer in self.answers), len(self.answers))

    @property
    def same_text(self) -> Share:
        """Rows whose response is the reference, white space at either end aside."""
        same = sum(answer.response.strip() == answer.reference.strip() for answer in self.answers)
        return Share(same, len(self.answers))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The numbers of this result."""
        return Measure.of("exact_match", self.exact_match), Measure.of("same_text", self.same_text)

    @property
    def counts(self) -> dict[str, int]:
        """What else there is to know."""
        return {
            "rows": len(self.answers),
            "unreadable_responses": sum(answer.found is None for answer in self.answers),
            "cut_prompts": self.cut_prompts,
            "max_new_tokens": self.max_new_tokens,
        }

    def records(self) -> list[dict[str, Any]]:
        """One for each row."""
        return [{"correct": answer.correct, **dataclasses.asdict(answer)} for answer in self.answers]

    def __str__(self) -> str:
        return f"exact match by rule {self.rule}: {self.exact_match}"


def exact_match(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    rule: str | Rule = "text",
    *,
    max_new_tokens: int = 256,
    max_source_length: int | None = None,
    batch_size: int = 16,
    progress: str | None = None,
) -> ExactMatch:
    """Let the model answer every example, greedily, and compare by a rule.

    The response that is asked for is the last one of the example; earlier turns of a chat are part of the prompt, as
    the example has them. The model stops at the token that ends a turn in training, at the tokenizer's EOS, or after
    ``max_new_tokens``. A prompt that leaves no room for these in the model's context, or is longer than
    ``max_source_length``, loses its beginning, BOS excepted, as in training.

    Args:
        model: base, adapted or merged.
        tokenizer: the model's.
        examples: chats, or prompts with a completion.
        rule: one of :data:`.RULES`, or its name.
        max_new_tokens: tokens that the model may write.
        max_source_length: most tokens of a prompt; None for what the model's context leaves.
        batch_size: responses that are generated together.
        progress: title of a progress bar, or None for none.

    Raises:
        DataError: an example without a response, or a reference that the rule cannot read.
        ConfigError: an unknown rule, or no room for a prompt.
    """
    rule = _rule(rule)
    room = model.config.max_position_embeddings - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens: found {max_new_tokens}, expected fewer than the {model.config.max_position_embeddings} "
            "tokens of the model's context, so that a prompt fits too."
        )
    references = [_response(example, place) for example, place in zip(examples.examples, examples.where, strict=True)]
    expected = [_expected(rule, text, place) for text, place in zip(references, examples.where, strict=True)]
    limits = Limits(_NO_LIMIT.whole, source=min(room, max_source_length or room))
    tokenized = tokenize_examples(
        tokenizer, examples.examples, examples.where, _NO_LIMIT, progress=progress is not None
    )
    prompts, cut = [], 0
    for ids, labels in tokenized:
        start, _ = _runs(labels != IGNORE)[-1]
        one = truncate(ids, np.arange(len(ids)) >= start, limits, bos=tokenizer.bos_token_id)
        prompts.append(one.input_ids[~one.loss].tolist())
        cut += one.source_cut
    stop = {end_of_turn_id(tokenizer), tokenizer.eos_token_id} - {None}
    written = generate_text(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        eos_token_id=sorted(stop),
        progress=progress,
    )
    answers = [
        Answer(where, str(tokenizer.decode(prompt)), reference, response, wanted, rule.read(response))
        for where, prompt, reference, response, wanted in zip(
            examples.where, prompts, references, written, expected, strict=True
        )
    ]
    return ExactMatch(rule.name, tuple(answers), cut, max_new_tokens)


def _rule(rule: str | Rule) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise ConfigError(f"rule: found {rule!r}, expected one of {', '.join(RULES)}.")
    return RULES[rule]


def _response(example: Example, where: str) -> str:
    """The last response of an example."""
    if isinstance(example, Chat):
        return next(message.content for message in reversed(example.messages) if message.role == "assistant")
    if isinstance(example, Completion):
        return example.completion
    raise DataError(f"{where}: plain text has no response to compare; give a chat, or a prompt with its completion.")


def _expected(rule: Rule, reference: str, where: str) -> str:
    found = rule.read(reference)
    if found is None:
        raise DataError(
            f"{where}: the reference does not hold {rule.reads} ({reference[-60:]!r}), which the rule {rule.name} "
            "compares; give data of this task, or compare whole texts with the task match."
        )
    return found
