"""Batches as a person can check them: every token, and whether it is in the loss."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lotaqaf_jax.data.packing import Batch
from lotaqaf_jax.data.pipeline import BatchStream
from lotaqaf_jax.data.tokenize import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["preview"]

_LOSS, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def preview(stream: BatchStream, tokenizer: PreTrainedTokenizerBase, n: int = 3, *, color: bool = False) -> str:
    """The first ``n`` examples of the first batches, just as the model gets them; the stream does not move.

    Neighbouring tokens with the same mask share a line. A line begins with ``loss`` if the model is trained
    to produce these tokens and with ``-`` if not, and ends with their number. Tokens are parted by ``·``, and
    a newline is shown as ``\\n``.

    Args:
        stream: the training batches.
        tokenizer: the tokenizer they were made with.
        n: examples to show.
        color: mark the loss in colour as well; for terminals only.
    """
    lines: list[str] = []
    for shown, (row, segment, ids, labels) in enumerate(_segments(stream)):
        if shown == n:
            break
        in_loss = labels != IGNORE
        lines.append(f"row {row}, example {segment}: {len(ids)} tokens, {in_loss.sum()} in the loss")
        for loss, group in groupby(zip(ids.tolist(), in_loss.tolist(), strict=True), key=lambda pair: pair[1]):
            tokens = [_show(tokenizer, token) for token, _ in group]
            text = f"{'loss' if loss else '-':<4} {'·'.join(tokens)}  ({len(tokens)})"
            lines.append(f"  {_LOSS if loss else _DIM}{text}{_PLAIN}" if color else f"  {text}")
        lines.append("")
    return "\n".join(lines)


def _segments(stream: BatchStream) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """(row, example in the row, input_ids, labels) over the first epoch, rows and examples counted from 1."""
    for step in range(stream.steps_per_epoch):
        batch: Batch = stream.peek(step)
        for row in range(stream.batch_size):
            for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
                here = batch["segment_ids"][row] == segment
                number = step * stream.batch_size + row + 1
                yield number, segment, batch["input_ids"][row][here], batch["labels"][row][here]


def _show(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = str(tokenizer.decode([token]))
    if "\ufffd" in text or not text:
        # Part of a character, or a token that is nothing by itself: its name in the vocabulary says more.
        text = str(tokenizer.convert_ids_to_tokens([token])[0])
    return _escape(text)


def _escape(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
