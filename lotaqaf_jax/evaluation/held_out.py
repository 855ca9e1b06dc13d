"""Loss and exact match on held-out rows, without generating a token.

Greedy generation writes exactly the reference response if and only if, at every position of the response, the most
likely next token after the prompt and the reference so far is the reference's next one: as long as that holds, both
have the same prefix. So one forward pass over prompt and reference tells whether greedy generation, end token
included, would match.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from lotaqaf_jax.models import Decoder
from lotaqaf_jax.parallel import put_rows
from lotaqaf_jax.training.loss import score_tokens

__all__ = ["HeldOut", "evaluate"]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Result on held-out rows.

    Attributes:
        loss: mean over all target tokens, in nats.
        token_accuracy: share of target tokens that are the most likely one.
        exact_match: share of rows whose every target token is; what greedy generation would score.
        rows: rows with at least one target.
        tokens: target tokens.
    """

    loss: float
    token_accuracy: float
    exact_match: float
    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, exact match {100 * self.exact_match:.1f} % of {self.rows} rows"


def evaluate(
    model: Decoder, batches: Iterable[Mapping[str, Any]], *, progress: str | None = None, total: int | None = None
) -> HeldOut:
    """Score a model on batches of one example a row (see docs/architecture.md for the arrays).

    Args:
        model: base, adapted or merged.
        batches: each a dict of (batch, length) arrays. Rows without a target, which fill up a batch, are not counted.
        progress: title of a progress bar, or None for none.
        total: number of batches, for the bar.

    Raises:
        ValueError: no row has a target.
    """
    graph, state = nnx.split(model)
    loss = 0.0
    tokens = correct = rows = matched = 0
    for batch in tqdm(batches, desc=progress, total=total, leave=False, disable=progress is None):
        sums = _score(graph, state, put_rows(model, batch))
        batch_loss, counted, right = (np.asarray(array) for array in sums)
        loss += float(batch_loss.sum(dtype=np.float64))
        tokens += int(counted.sum())
        correct += int(right.sum())
        rows += int((counted > 0).sum())
        matched += int(((counted > 0) & (right == counted)).sum())
    if not rows:
        raise ValueError("no held-out row has a target token to score")
    return HeldOut(loss / tokens, correct / tokens, matched / rows, rows, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graph: nnx.GraphDef, state: nnx.State, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per row: summed loss, number of targets, number of them that are the most likely token."""
    model = nnx.merge(graph, state)
    scores = score_tokens(model, batch["input_ids"], batch["labels"], batch["positions"], batch["segment_ids"])
    sums = scores.loss.sum(-1), scores.counted.sum(-1), scores.correct.sum(-1)
    # Whole everywhere, so that every process can read them.
    return sums if model.sharding is None else jax.lax.with_sharding_constraint(sums, model.sharding.named())
