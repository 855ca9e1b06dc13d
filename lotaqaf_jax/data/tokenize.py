"""Examples become token ids with a loss mask, cut to length.

Truncation, for limits S (source), T (target) and L (whole example), over the turns (source, target) of an
example:

- The first source loses its *beginning*, so that the question's end and the generation prompt stay; a BOS at
  the very front stays too. It keeps at most S tokens, and gives way to the first target as long as it keeps L
  // 2.
- A target loses its end, and with it its EOS: the model must not learn to stop in the middle. It keeps at
  most T tokens and what is left of L. The example ends there.
- A later source that is longer than S, or for which no room is left, ends the example before its turn. The
  example then counts as truncated in its source.
- Plain text has no source: it keeps its first L tokens, and counts as truncated in its target.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lotaqaf_jax.data.formats import Chat, Example, Message
from lotaqaf_jax.data.template import Rendered, TemplateRenderer
from lotaqaf_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE",
    "Limits",
    "Tokenized",
    "TokenizedExamples",
    "Truncated",
    "end_of_turn_id",
    "tokenize_examples",
    "truncate",
]

IGNORE = -100
"""The label of a token on which no loss is taken."""

_CHUNK = 512

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Limits:
    """The most tokens of a source, of a target and of a whole example; None is no limit."""

    whole: int
    source: int | None = None
    target: int | None = None


class Tokenized(NamedTuple):
    """One example: ``input_ids`` and ``labels``, both (length,) int32; -100 where no loss is taken."""

    input_ids: Ids
    labels: Ids


class Truncated(NamedTuple):
    """An example cut to length, and what was cut."""

    input_ids: Ids
    loss: Mask
    source_cut: bool
    target_cut: bool


@dataclass(frozen=True)
class TokenizedExamples:
    """Many examples, end to end.

    Attributes:
        input_ids: (tokens,) int32.
        loss: (tokens,) bool, True where the token is a label.
        offsets: (examples + 1,) int64; example i is tokens ``offsets[i]`` to ``offsets[i + 1]``.
        where: the place of each example's row.
        truncated_sources: number of examples whose source was cut.
        truncated_targets: number of examples whose target was cut.
        dropped: number of examples left out because no token of theirs is in the loss.
        unknown_tokens: number of unknown tokens; 0 if the tokenizer's unknown token is its BOS or EOS.
        skipped: for each example that could not be rendered and was left out, the sentence that says why.
    """

    input_ids: Ids
    loss: Mask
    offsets: NDArray[np.int64]
    where: tuple[str, ...]
    truncated_sources: int = 0
    truncated_targets: int = 0
    dropped: int = 0
    unknown_tokens: int = 0
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> Tokenized:
        span = slice(self.offsets[index], self.offsets[index + 1])
        ids = self.input_ids[span]
        return Tokenized(ids, np.where(self.loss[span], ids, np.int32(IGNORE)))

    def __iter__(self) -> Iterator[Tokenized]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, (examples,) int64."""
        return np.diff(self.offsets)


def tokenize_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    where: Sequence[str],
    limits: Limits,
    *,
    skip_bad: bool = False,
    progress: bool = True,
) -> TokenizedExamples:
    """Render, tokenize and truncate examples; leave out those without a token in the loss.

    The whole text is tokenized at once and each token belongs to the piece that it begins in. If a token
    would reach over the edge of a piece, that example is tokenized piece by piece, as it is when the model is
    prompted.

    Args:
        tokenizer: a Transformers tokenizer.
        examples: what to tokenize.
        where: the place of each example's row, for messages.
        limits: the truncation limits.
        skip_bad: leave out examples that cannot be rendered instead of raising.
        progress: show a progress bar when the terminal can.

    Raises:
        DataError: an example that the chat template cannot render, or no example with a token in the loss.
    """
    from tqdm import tqdm

    render = TemplateRenderer(tokenizer)
    unk = tokenizer.unk_token_id
    counts_unknown = unk is not None and unk not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    kept: list[Truncated] = []
    places: list[str] = []
    skipped: list[str] = []
    source_cuts = target_cuts = unknown = 0
    bar = tqdm(total=len(examples), desc="Tokenizing", unit="row", disable=None if progress else True)
    with bar:
        for start in range(0, len(examples), _CHUNK):
            rendered: list[tuple[str, Rendered]] = []
            chunk = examples[start : start + _CHUNK]
            for example, place in zip(chunk, where[start : start + _CHUNK], strict=True):
                try:
                    rendered.append((place, render(example)))
                except DataError as error:
                    if not skip_bad:
                        raise DataError(f"{place}: {error}") from error
                    skipped.append(f"{place}: {error}")
            encoded = _encode(tokenizer, [one for _, one in rendered])
            for (place, one), (ids, loss) in zip(rendered, encoded, strict=True):
                cut = truncate(ids, loss, limits, bos=tokenizer.bos_token_id, has_source=one.has_source)
                source_cuts += cut.source_cut
                target_cuts += cut.target_cut
                if cut.loss.any():
                    kept.append(cut)
                    places.append(place)
                    if counts_unknown:
                        unknown += int((cut.input_ids == unk).sum())
            bar.update(len(chunk))
    if len(skipped) == len(examples):
        raise DataError(f"none of the {len(examples)} examples can be used; the first: {skipped[0]}")
    dropped = len(examples) - len(skipped) - len(kept)
    if not kept:
        raise DataError(
            f"all {dropped} examples have every label masked: after truncation to {limits.whole} tokens "
            f"(source {limits.source}, target {limits.target}) no response is left; raise max_seq_length"
        )
    return TokenizedExamples(
        input_ids=np.concatenate([cut.input_ids for cut in kept]),
        loss=np.concatenate([cut.loss for cut in kept]),
        offsets=np.cumsum([0, *(len(cut.input_ids) for cut in kept)], dtype=np.int64),
        where=tuple(places),
        truncated_sources=source_cuts,
        truncated_targets=target_cuts,
        dropped=dropped,
        unknown_tokens=unknown,
        skipped=tuple(skipped),
    )


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a trained response ends with; generation has to stop at it, and at the model's EOS."""
    chat = Chat((Message("user", "a"), Message("assistant", "b")))
    ((ids, _),) = _encode(tokenizer, [TemplateRenderer(tokenizer)(chat)])
    return int(ids[-1])


def _encode(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> Iterator[tuple[Ids, Mask]]:
    """Ids and loss mask of each example, BOS and EOS included; the first token is never in the loss."""
    if not rendered:
        return
    texts = ["".join(piece.text for piece in one.pieces) for one in rendered]
    options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if tokenizer.is_fast:
        encoded = tokenizer(texts, return_offsets_mapping=True, **options)
        items = zip(encoded.input_ids, encoded.offset_mapping, rendered, strict=True)
        wholes = [_mask_by_offsets(*item) for item in items]
    else:
        wholes = [None] * len(texts)
    for one, whole in zip(rendered, wholes, strict=True):
        if whole is None:
            parts = tokenizer([piece.text for piece in one.pieces], **options).input_ids
            loss = [piece.loss for piece, part in zip(one.pieces, parts, strict=True) for _ in part]
            whole = list(itertools.chain.from_iterable(parts)), loss
        ids, loss = whole
        if one.bos:
            ids, loss = [tokenizer.bos_token_id, *ids], [False, *loss]
        # A text may already end with EOS; one is enough, and it is in the loss either way.
        if one.eos and ids[-1:] != [tokenizer.eos_token_id]:
            ids, loss = [*ids, tokenizer.eos_token_id], [*loss, True]
        mask = np.asarray(loss, np.bool_)
        mask[:1] = False
        yield np.asarray(ids, np.int32), mask


def _mask_by_offsets(
    ids: list[int], offsets: list[tuple[int, int]], rendered: Rendered
) -> tuple[list[int], list[bool]] | None:
    """Ids and mask by the piece that each token begins in; None when a token reaches into another piece."""
    ends = np.cumsum([len(piece.text) for piece in rendered.pieces])
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    first = np.searchsorted(ends, spans[:, 0], side="right")
    last = np.searchsorted(ends, np.maximum(spans[:, 1] - 1, spans[:, 0]), side="right")
    if (first != last).any() or (first == len(ends)).any():
        return None
    return ids, [rendered.pieces[index].loss for index in first]


def truncate(ids: Ids, loss: Mask, limits: Limits, *, bos: int | None = None, has_source: bool = True) -> Truncated:
    """Cut an example to length; the module's docstring has the rule.

    Args:
        ids: (length,) int32.
        loss: (length,) bool; alternates between sources (False) and targets (True), a source first.
        limits: the limits S, T and L.
        bos: the id of BOS, kept when it is the first token.
        has_source: False for plain text, to which only L applies.
    """
    length = len(ids)
    whole = limits.whole
    if not has_source:
        return Truncated(ids[:whole], loss[:whole], False, length > whole)
    source_limit = limits.source or length
    target_limit = limits.target or length
    edges = [0, *(np.flatnonzero(np.diff(loss)) + 1), length]
    stretches = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
    keep: list[NDArray[np.int64]] = []
    room = whole
    source_cut = target_cut = False
    for turn, (source, target) in enumerate(zip(stretches[::2], stretches[1::2], strict=False)):
        if turn == 0:
            for_target = min(len(target), target_limit)
            most = min(source_limit, max(whole - for_target, whole // 2))
            source_cut = len(source) > most
            source = _keep_end(source, most, has_bos=bos is not None and ids[0] == bos)
        elif len(source) > source_limit or len(source) >= room:
            source_cut = True
            break
        room -= len(source)
        most = min(target_limit, room)
        target_cut = len(target) > most
        keep += [source, target[:most]]
        room -= len(target[:most])
        if target_cut:
            break
    chosen = np.concatenate(keep) if keep else np.arange(0)
    return Truncated(ids[chosen], loss[chosen], source_cut, target_cut)


def _keep_end(source: NDArray[np.int64], most: int, *, has_bos: bool) -> NDArray[np.int64]:
    if len(source) <= most:
        return source
    if has_bos and most > 1:
        return np.concatenate([source[:1], source[len(source) - most + 1 :]])
    return source[len(source) - most :]
