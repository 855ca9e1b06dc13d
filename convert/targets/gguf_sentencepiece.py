"""Tokenizers of the kind of SentencePiece's BPE, as Llama 2 has them, for llama.cpp: tokens with scores, no merges.

llama.cpp joins, as long as it can, the two neighbours whose union is the token of the highest score, the leftmost of
equals; a tokenizer.json joins the two that come first in its list of merges. Both do the same if

* the score of a token is minus the place of the merge that completes it. That is one merge for each token: as long as
  nothing is joined across its ends, its letters are joined as if they stood alone, whatever is around them;
* no two neighbours that are no merge make a token. By the same reasoning, such a token comes out as those two parts
  when it is encoded alone; a tokenizer with one is refused.

Source: ``llm_tokenizer_spm`` of llama.cpp; BPE of the package ``tokenizers``.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["SPACE", "kind_of", "misfits", "scores", "space_prefix"]

SPACE = "\u2581"
"""What stands for a space in tokens."""

_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_SCHEMES = {"always": True, "first": True, "never": False}

Steps = Sequence[Mapping[str, Any]]


def misfits(
    model: Mapping[str, Any], normalizers: Steps, pre_tokenizers: Steps, added: Container[str]
) -> Iterator[str]:
    """What llama.cpp's SentencePiece does not do; nothing for a tokenizer that it holds.

    Args:
        model: the BPE of a tokenizer.json.
        normalizers: the steps that change the text.
        pre_tokenizers: the steps that cut it.
        added: tokens that are cut out of a text before the rest is encoded.
    """
    if not model.get("byte_fallback") or not model["vocab"].keys() >= _BYTES:
        yield "has no token for every byte (byte_fallback), and llama.cpp knows no other way to write what has no token"
    if space_prefix(normalizers, pre_tokenizers) is None:
        names = ", ".join(step["type"] for step in (*normalizers, *pre_tokenizers))
        yield f"changes or cuts the text by {names or 'nothing'}, which is not {SPACE} for every space"
    if model.get("ignore_merges"):
        yield "takes words that are tokens whole (ignore_merges)"
    ranks = _ranks(model)
    never = [token for token in model["vocab"] if token not in added and len(_joined(token, ranks)[0]) == 2]
    if never:
        yield f"never makes the token {never[0]!r} (and {len(never) - 1} more), which llama.cpp makes of its halves"


def space_prefix(normalizers: Steps, pre_tokenizers: Steps) -> tuple[bool, bool] | None:
    """Whether a space is put before the text, and whether also before one that begins with a space or follows a special
    token, as llama.cpp does; None where more is done to the text than to write ``SPACE`` for spaces.
    """
    changes, cuts = list(normalizers), list(pre_tokenizers)
    if not cuts and changes in ([_REPLACE], [_PREPEND, _REPLACE]):
        return len(changes) == 2, True
    if changes or [step["type"] for step in cuts] != ["Metaspace"]:
        return None
    prefix = _SCHEMES.get(cuts[0].get("prepend_scheme", "always"))
    if prefix is None or cuts[0].get("replacement") != SPACE or cuts[0].get("split", True):
        return None
    return prefix, not prefix


def scores(model: Mapping[str, Any]) -> dict[str, float]:
    """Of every token: minus the place of the merge that completes it; below all these, a token that none completes."""
    ranks = _ranks(model)
    found = {}
    for token in model["vocab"]:
        parts, rank = _joined(token, ranks)
        found[token] = -float(len(ranks) if rank is None or len(parts) > 1 else rank)
    return found


def kind_of(token: str, model: Mapping[str, Any]) -> str:
    """``TokenType`` of a token of the vocabulary, by name."""
    if token == model.get("unk_token"):
        return "UNKNOWN"
    return "BYTE" if token in _BYTES else "NORMAL"


def _ranks(model: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    # Older files have a merge as one string.
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return {(left, right): place for place, (left, right) in enumerate(pairs)}


def _joined(text: str, ranks: Mapping[tuple[str, str], int]) -> tuple[list[str], int | None]:
    """The parts in which BPE leaves a text, and the place of the last merge that it made."""
    parts, last = list(text), None
    while len(parts) > 1:
        found = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not found:
            break
        last, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts, last
