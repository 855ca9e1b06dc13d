"""Perplexity on text: in windows of one joined text, as papers on quantisation report it, or document by document.

Windows (:func:`perplexity`). All texts are joined by a blank line and tokenized as one, with the tokenizer's own
special tokens. The tokens are cut into windows of L; a rest that does not fill a window is dropped, unless it is all
there is. Every window is a row of its own: its first token is predicted by nothing and not counted, the others are
predicted from those before them in the window. So a window counts L - 1 tokens.

Documents (:func:`document_perplexity`). Every text is tokenized alone, without special tokens, and each of its tokens
is predicted exactly once: the first from BOS, or from EOS where the tokenizer has no BOS; the others from those before
them. A text longer than L is cut: the first L tokens are predicted together, then L at a time, the first of them from
the one token before it; the last ones have a full L tokens before them.

In both, the loss is the sum over all counted tokens divided by their number, so that a long document weighs more than a
short one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.evaluation.intervals import Interval, Measure, bootstrap_interval
from lotaqaf_jax.evaluation.likelihood import Span, log_likelihoods
from lotaqaf_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Perplexity", "UnitLoss", "document_perplexity", "perplexity", "prefix_token", "rolling_spans"]

_WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class UnitLoss:
    """One window or document: negative log-likelihood in nats, counted tokens, and the bytes of UTF-8 that they
    stand for, or None."""

    loss: float
    tokens: int
    text_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts text.

    Attributes:
        unit: "windows" or "documents".
        window: most tokens that are computed together, L.
        units: the windows or documents, in order.
        dropped: tokens that were not looked at: a rest that did not fill a window.
        unknown: counted tokens that the tokenizer does not know.
        empty: documents without a token, which are not among the units.
        seed: of the interval's draws.
    """

    unit: str
    window: int
    units: tuple[UnitLoss, ...]
    dropped: int = 0
    unknown: int = 0
    empty: int = 0
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Counted tokens."""
        return sum(unit.tokens for unit in self.units)

    @property
    def loss(self) -> float:
        """Nats per counted token."""
        return sum(unit.loss for unit in self.units) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def text_bytes(self) -> int | None:
        """Bytes of UTF-8 that the counted tokens stand for; None where they are not known."""
        sizes = [unit.text_bytes for unit in self.units]
        total = sum(size or 0 for size in sizes)
        return None if None in sizes or self.unknown or not total else total

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits per byte of text, which compares models of different tokenizers; None where bytes are not known.

        They are not where the tokenizer is a slow one, which does not tell which token stands for which text, nor where
        it does not know some of the text.
        """
        size = self.text_bytes
        return None if size is None else sum(unit.loss for unit in self.units) / math.log(2) / size

    @property
    def interval(self) -> Interval | None:
        """The :func:`bootstrap_interval` of the loss over the units; None for a single one."""
        pairs = [(unit.loss, unit.tokens) for unit in self.units]
        return bootstrap_interval([loss for loss, _ in pairs], [count for _, count in pairs], seed=self.seed)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The numbers of this result."""
        ends = self.interval
        found = [
            Measure("loss", self.loss, ends, self.tokens, "tokens"),
            Measure(
                "perplexity",
                self.perplexity,
                None if ends is None else (math.exp(ends[0]), math.exp(ends[1])),
                self.tokens,
                "tokens",
            ),
        ]
        if self.bits_per_byte is not None and self.text_bytes is not None:
            sizes = [unit.text_bytes or 0 for unit in self.units]
            bits = [unit.loss / math.log(2) for unit in self.units]
            ends = bootstrap_interval(bits, sizes, seed=self.seed)
            found.append(Measure("bits_per_byte", self.bits_per_byte, ends, self.text_bytes, "bytes"))
        return tuple(found)

    @property
    def counts(self) -> dict[str, int]:
        """What else there is to know."""
        return {
            self.unit: len(self.units),
            "tokens": self.tokens,
            "window": self.window,
            "dropped_tokens": self.dropped,
            "unknown_tokens": self.unknown,
            "empty_documents": self.empty,
        }

    def records(self) -> list[dict[str, Any]]:
        """One row a window or document."""
        return [{self.unit[:-1]: number, **dataclasses.asdict(unit)} for number, unit in enumerate(self.units)]

    def __str__(self) -> str:
        return f"{self.loss:.4f} nats per token, perplexity {self.perplexity:.3f}, {len(self.units)} {self.unit}"


def perplexity(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    *,
    window: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: str | None = None,
) -> Perplexity:
    """Perplexity of texts joined into one, in windows; the module's docstring has the rule.

    Args:
        model: base, adapted or merged.
        tokenizer: the model's.
        texts: one text, or several, which are joined by a blank line.
        window: tokens of a window, L; None for 2048, or the model's context where that is shorter.
        limit: only the first so many windows.
        batch_size: windows that are computed together.
        seed: of the interval's draws.
        progress: title of a progress bar, or None for none.

    Raises:
        DataError: fewer than two tokens.
        ConfigError: a window of fewer than 2 tokens, or longer than the model's context.

    Source: the evaluation of GPTQ (arXiv 2210.17323), of which this is the usual form for wikitext2.
    """
    length = _window(model, window)
    text = texts if isinstance(texts, str) else "\n\n".join(texts)
    encoded = tokenizer(text, return_offsets_mapping=bool(tokenizer.is_fast), verbose=False)
    ids = [int(token) for token in encoded.input_ids]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens, expected at least 2; give a longer text.")
    count = max(1, len(ids) // length)
    pieces = [(i * length, min((i + 1) * length, len(ids))) for i in range(count)][:limit]
    scores = log_likelihoods(model, [Span(ids[a:b], 1) for a, b in pieces], batch_size=batch_size, progress=progress)
    sizes = [_bytes(text, encoded.offset_mapping, a, b) if tokenizer.is_fast else None for a, b in pieces]
    units = [UnitLoss(-one.total, len(one.log_probs), size) for one, size in zip(scores, sizes, strict=True)]
    unknown = sum(_unknown(tokenizer, ids[a + 1 : b]) for a, b in pieces)
    return Perplexity("windows", length, tuple(units), len(ids) - pieces[-1][1], unknown, 0, seed)


def document_perplexity(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    window: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: str | None = None,
) -> Perplexity:
    """Perplexity of texts, each alone; the module's docstring has the rule.

    Args:
        model: base, adapted or merged.
        tokenizer: the model's.
        texts: the documents.
        window: most tokens that are computed together, L; None for 2048, or the model's context where that is shorter.
        limit: only the first so many documents.
        batch_size: rows that are computed together.
        seed: of the interval's draws.
        progress: title of a progress bar, or None for none.

    Raises:
        DataError: no document has a token, or the tokenizer has neither BOS nor EOS to begin one with.
        ConfigError: a window of fewer than 2 tokens, or longer than the model's context.
    """
    length = _window(model, window)
    first = prefix_token(tokenizer)
    texts = [texts] if isinstance(texts, str) else list(texts)[:limit]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    held = [(text, [int(token) for token in ids]) for text, ids in zip(texts, encoded, strict=True) if ids]
    if not held:
        raise DataError(f"none of the {len(texts)} documents has a token to predict; give some text.")
    spans, owners = [], []
    for number, (_, ids) in enumerate(held):
        cut = rolling_spans(ids, first, length)
        spans += cut
        owners += [number] * len(cut)
    losses = np.zeros(len(held))
    for owner, one in zip(owners, log_likelihoods(model, spans, batch_size=batch_size, progress=progress), strict=True):
        losses[owner] -= one.total
    units = [
        UnitLoss(float(loss), len(ids), len(text.encode())) for loss, (text, ids) in zip(losses, held, strict=True)
    ]
    unknown = sum(_unknown(tokenizer, ids) for _, ids in held)
    return Perplexity("documents", length, tuple(units), 0, unknown, len(texts) - len(held), seed)


def rolling_spans(ids: Sequence[int], first: int, length: int) -> list[Span]:
    """Cut a text so that every token is predicted exactly once, from as many as ``length`` tokens before it.

    Args:
        ids: the text.
        first: the token that the first one is predicted from.
        length: most tokens of an input.

    Returns:
        Spans of at most ``length + 1`` tokens. The first begins with ``first``; every other predicts ``length`` tokens
        from the one token before them, but the last reaches back so far that its input is ``length`` tokens.
    """
    whole = [first, *ids]
    spans = []
    for start in range(0, len(ids), length):
        stop = min(start + length, len(ids))
        begin = max(0, stop - length)
        spans.append(Span(whole[begin : stop + 1], start + 1 - begin))
    return spans


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a text without any context is predicted from: BOS, or EOS where there is none.

    Raises:
        DataError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(
        "the tokenizer has neither BOS nor EOS, so nothing predicts the first token of a text; set bos_token in its "
        "tokenizer_config.json."
    )


def _window(model: Decoder, window: int | None) -> int:
    most = model.config.max_position_embeddings
    if window is None:
        return min(_WINDOW, most)
    if not 2 <= window <= most:
        raise ConfigError(
            f"window: found {window}, expected 2 to {most} tokens, the model's max_position_embeddings; choose one."
        )
    return window


def _bytes(text: str, offsets: Sequence[tuple[int, int]], start: int, stop: int) -> int:
    """Bytes of the text from the end of token ``start`` to the end of token ``stop - 1``: those that are predicted."""
    return len(text[offsets[start][1] : offsets[stop - 1][1]].encode())


def _unknown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return 0
    return sum(token == unknown for token in ids)
