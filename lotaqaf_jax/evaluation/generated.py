"""Exact match of texts: what the model writes against what it should have written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lotaqaf_jax.data import IGNORE, end_of_turn_id
from lotaqaf_jax.generation import generate_text
from lotaqaf_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GeneratedMatch", "generated_match"]


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
