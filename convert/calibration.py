"""Calibration text -> samples of token ids.

1. The documents are the rows of the dataset, in any format that training reads (:mod:`lotaqaf_jax.data.formats`; a row
   with a ``text`` column is plain text, a chat goes through the tokenizer's template). A .txt file is one document.
2. They are shuffled by the seed, tokenised as for training (BOS where the tokenizer puts one, EOS at the end) and
   joined, until there are tokens for all samples or no documents are left.
3. The tokens are cut into windows of one length; what is left over at the end is dropped.
4. Where there are more windows than samples (the last document may bring several), so many are drawn by the seed.
"""

from __future__ import annotations

import gzip
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lotaqaf_jax.data import Example, Limits, Text, load_examples, tokenize_examples
from lotaqaf_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["calibration_samples", "check_samples", "documents_of"]

_DOCUMENTS = 256  # tokenised at a time


def calibration_samples(
    dataset: str | Path, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int = 0
) -> list[np.ndarray]:
    """Samples of a dataset by the rule above.

    Args:
        dataset: a file or whatever else :func:`lotaqaf_jax.data.load_examples` reads; its split "train".
        tokenizer: the model's.
        samples: how many; fewer, with a warning, where the text does not suffice.
        length: tokens of each.
        seed: of the order of the documents, and of the draw.

    Returns:
        Arrays (length,) int32.

    Raises:
        ConfigError: samples or length is less than 1.
        DataError: the dataset cannot be read, or holds fewer tokens than one sample.
    """
    for flag, value in (("--samples", samples), ("--length", length)):
        if value < 1:
            raise ConfigError(f"{flag}: found {value}, expected 1 or more.")
    documents, where = documents_of(str(dataset))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(documents))
    parts: list[np.ndarray] = []
    found = 0
    for start in range(0, len(order), _DOCUMENTS):
        chosen = order[start : start + _DOCUMENTS]
        ids = tokenize_examples(
            tokenizer,
            [documents[i] for i in chosen],
            [where[i] for i in chosen],
            Limits(whole=2**62),
            progress=False,
        ).input_ids
        parts.append(ids)
        found += len(ids)
        if found >= samples * length:
            break
    windows = found // length
    if not windows:
        raise DataError(
            f"{dataset}: holds {found} tokens, fewer than one sample of {length}. Give more text, or a smaller "
            "--length."
        )
    if windows < samples:
        warnings.warn(
            f"{dataset}: its {found} tokens make {windows} samples of {length} tokens, not {samples}.", stacklevel=2
        )
    cut = np.concatenate(parts)[: windows * length].reshape(windows, length)
    drawn = rng.permutation(windows)[:samples] if windows > samples else np.arange(windows)
    return list(cut[drawn])


def documents_of(dataset: str) -> tuple[Sequence[Example], Sequence[str]]:
    """The documents of a dataset, in its order, and the place of each, for messages.

    Raises:
        DataError: the dataset cannot be read.
    """
    path = Path(dataset).expanduser()
    if not path.name.removesuffix(".gz").endswith(".txt"):
        read = load_examples(dataset)
        return read.examples, read.where
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{dataset}: no such file. Pass a file of calibration text.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise DataError(f"{dataset}: cannot be read as text ({problem}). Pass a whole UTF-8 file.") from problem
    if not text.strip():
        raise DataError(f"{dataset}: is empty. Pass a file of calibration text.")
    return [Text(text)], [path.name]


def check_samples(samples: Iterable[Sequence[int] | np.ndarray], vocab_size: int, longest: int) -> list[np.ndarray]:
    """Samples of token ids as arrays, checked against the model.

    Args:
        samples: token ids, each sample of any length.
        vocab_size: of the model.
        longest: positions that the model has.

    Raises:
        DataError: no samples, an empty one, one longer than the model's context, or an id that it has no embedding for.
    """
    arrays = [np.asarray(sample) for sample in samples]
    if not arrays:
        raise DataError("calibration: no samples, expected at least one.")
    for i, ids in enumerate(arrays):
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"calibration: sample {i} is {ids.dtype} {ids.shape}, expected (length,) token ids.")
        if len(ids) > longest:
            raise DataError(
                f"calibration: sample {i} has {len(ids)} tokens, the model has {longest} positions "
                "(max_position_embeddings). Give a smaller --length."
            )
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise DataError(
                f"calibration: sample {i} holds token {ids.max() if ids.max() >= vocab_size else ids.min()}, the model "
                f"knows 0 to {vocab_size - 1}. Use the model's own tokenizer."
            )
    return [ids.astype(np.int32) for ids in arrays]
