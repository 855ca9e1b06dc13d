"""The batches of a run: training without end and in a new order every epoch, validation in file order.

Grain shuffles the planned rows anew for every epoch from (seed, epoch), batches and repeats them. The last
batch of an epoch is filled up with empty rows (``segment_ids`` 0, ``labels`` -100), so that an epoch holds
every row exactly once and all batches have one shape. A loss must therefore be averaged over labels, not over
rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lotaqaf_jax.data.config import DataConfig
from lotaqaf_jax.data.packing import Batch, Plan, collate, plan_rows
from lotaqaf_jax.data.sources import Examples, load_examples
from lotaqaf_jax.data.tokenize import Limits, TokenizedExamples, tokenize_examples
from lotaqaf_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BatchStream", "Batches", "DataReport", "TrainingData", "load_data"]

# Without packing rows are as long as the longest example, rounded up to this: a round number for the matmuls.
_ROW_MULTIPLE = 64


@dataclass(frozen=True)
class _Rows:
    """Planned rows and how they become a batch."""

    examples: TokenizedExamples
    plan: Plan
    batch_size: int
    row_length: int
    pad_id: int

    def collate(self, rows: Sequence[Sequence[int]]) -> Batch:
        return collate(rows, self.examples, batch_size=self.batch_size, row_length=self.row_length, pad_id=self.pad_id)

    @property
    def num_batches(self) -> int:
        return math.ceil(len(self.plan) / self.batch_size)


class Batches:
    """Held-out rows as batches in file order; can be gone through any number of times.

    Attributes:
        examples: the tokenized rows.
    """

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self.examples = rows.examples

    def __len__(self) -> int:
        return self._rows.num_batches

    def __iter__(self) -> Iterator[Batch]:
        size = self._rows.batch_size
        return (self._rows.collate(self._rows.plan[start * size : (start + 1) * size]) for start in range(len(self)))


class BatchStream:
    """Training batches without end, epoch after epoch; an iterator whose place can be saved and restored.

    Attributes:
        examples: the tokenized examples.
        batch_size: rows of a batch.
        row_length: tokens in a row.
        rows_per_epoch: rows that hold all examples once.
        steps_per_epoch: ``ceil(rows_per_epoch / batch_size)``.
    """

    def __init__(self, rows: _Rows, seed: int) -> None:
        import grain  # Not above: measuring and kernels get along without it.

        self._rows = rows
        self._seed = seed
        self.examples = rows.examples
        self.batch_size = rows.batch_size
        self.row_length = rows.row_length
        self.rows_per_epoch = len(rows.plan)
        self.steps_per_epoch = rows.num_batches
        self._batches = (
            grain.MapDataset.source(rows.plan)
            .seed(seed)
            .shuffle()
            .batch(rows.batch_size, batch_fn=rows.collate)
            .repeat()
        )
        # A batch takes far less time than a step, so it is made when asked for, without threads.
        no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(self._batches.to_iter_dataset(no_threads))
        self._fingerprint: str | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def peek(self, step: int) -> Batch:
        """The batch of a step, counted from 0, without moving the stream."""
        return self._batches[step]

    def state(self) -> dict[str, Any]:
        """Where the stream stands: small, made of dicts, strings and numbers, the same on every machine."""
        return {"iterator": self._iterator.get_state(), "fingerprint": self.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a place that :meth:`state` gave: the remaining batches are the same.

        Raises:
            DataError: the state was made with other data, tokenizer, lengths, packing, batch size or seed.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the saved place in the data (fingerprint {state.get('fingerprint')}) is not one of this "
                f"data ({self.fingerprint}): resume with the dataset, tokenizer, lengths, packing, batch "
                "size and seed that the run was started with"
            )
        self._iterator.set_state(dict(state["iterator"]))

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the batches."""
        if self._fingerprint is None:
            examples = self.examples
            settings = [self._seed, self.batch_size, self.row_length, self._rows.pad_id]
            digest = hashlib.sha256()
            for array in (
                examples.input_ids,
                examples.loss,
                examples.offsets,
                np.asarray(settings, np.int64),
            ):
                digest.update(np.ascontiguousarray(array).tobytes())
            for row in self._rows.plan:
                digest.update(np.asarray([*row, -1], np.int64).tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of the training dataset; ``str`` gives it as lines to print.

    Attributes:
        dataset: the dataset's name.
        format: the format of its rows.
        ignored_columns: columns that were not used.
        rows: rows read.
        skipped: for each unusable row left out (of training and held-out rows), the sentence that says why.
        dropped: examples left out because truncation left no label (the same).
        truncated_sources: examples whose source was cut (the same).
        truncated_targets: examples whose target was cut (the same).
        unknown_tokens: tokens that the tokenizer does not know (the same).
        examples: training examples.
        tokens: their tokens.
        loss_tokens: those of them in the loss.
        longest: tokens of the longest.
        row_length: tokens in a row of a batch.
        rows_per_epoch: rows that hold all training examples.
        steps_per_epoch: batches of an epoch.
        validation_examples: held-out examples.
    """

    dataset: str
    format: str
    ignored_columns: tuple[str, ...]
    rows: int
    skipped: tuple[str, ...]
    dropped: int
    truncated_sources: int
    truncated_targets: int
    unknown_tokens: int
    examples: int
    tokens: int
    loss_tokens: int
    longest: int
    row_length: int
    rows_per_epoch: int
    steps_per_epoch: int
    validation_examples: int

    def __str__(self) -> str:
        fill = self.tokens / (self.rows_per_epoch * self.row_length)
        lines = [
            f"dataset      {self.dataset}: {self.rows:,} rows, format {self.format}",
            f"training     {self.examples:,} examples, {self.tokens:,} tokens, {self.loss_tokens:,} in the "
            f"loss; the longest has {self.longest:,}",
            f"rows         {self.rows_per_epoch:,} of {self.row_length:,} tokens, {fill:.0%} full; "
            f"{self.steps_per_epoch:,} steps an epoch",
            f"truncated    {self.truncated_sources:,} sources, {self.truncated_targets:,} targets",
        ]
        if self.validation_examples:
            lines.append(f"held out     {self.validation_examples:,} examples")
        if self.dropped:
            lines.append(f"dropped      {self.dropped:,} examples without a label after truncation")
        if self.skipped:
            lines.append(f"skipped      {len(self.skipped):,} rows that cannot be used; the first: {self.skipped[0]}")
        if self.unknown_tokens:
            lines.append(f"unknown      {self.unknown_tokens:,} tokens that the tokenizer does not know")
        if self.ignored_columns:
            lines.append(f"not used     columns {', '.join(self.ignored_columns)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class TrainingData:
    """All a training run needs of its data."""

    train: BatchStream
    validation: Batches | None
    report: DataReport

    def num_steps(self, epochs: float) -> int:
        """Steps in so many epochs, rounded up."""
        # The small amount keeps 0.1 * 30 from becoming 4.
        return math.ceil(epochs * self.train.steps_per_epoch - 1e-9)


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    eval_batch_size: int | None = None,
    *,
    progress: bool = True,
) -> TrainingData:
    """Read, tokenize, split, pack and batch.

    Args:
        config: what to read and how.
        tokenizer: a Transformers tokenizer.
        batch_size: rows of a training batch, over all devices and accumulation steps.
        eval_batch_size: rows of a validation batch; None means ``batch_size``.
        progress: show a progress bar.

    Returns:
        the training stream, the validation batches if there are held-out rows (never packed), and the report.

    Raises:
        DataError: see :func:`load_examples` and :func:`tokenize_examples`; also ``val_size`` leaving no row
            to train on, and a batch size below 1.
    """
    for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
        if size is not None and size < 1:
            raise DataError(f"{name} is {size}; give 1 or more")
    limits = Limits(config.max_seq_length, config.max_source_length, config.max_target_length)
    tokenize = partial(_tokenize, tokenizer, limits, progress=progress, skip_bad=config.skip_bad_rows)
    load = partial(load_examples, format=config.format, skip_bad_rows=config.skip_bad_rows)
    source = load(config.dataset, config.split, max_samples=config.max_samples)
    rows, skipped = len(source.examples) + len(source.skipped), source.skipped
    held_out: Examples | None = None
    if config.has_eval_dataset:
        held_out = load(
            config.eval_dataset or config.dataset,
            config.eval_split or "validation",
            max_samples=config.max_eval_samples,
        )
        skipped += held_out.skipped
    elif config.val_size:
        source, held_out = _split(source, config.val_size, config.seed)
    train = tokenize(source)
    validation = None if held_out is None else tokenize(held_out)
    both = [train] if validation is None else [train, validation]

    longest = max(int(examples.lengths.max()) for examples in both)
    rounded = math.ceil(longest / _ROW_MULTIPLE) * _ROW_MULTIPLE
    row_length = config.max_seq_length if config.packing else min(config.max_seq_length, rounded)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    plan = plan_rows(train.lengths, row_length, packing=config.packing, seed=config.seed)
    stream = BatchStream(_Rows(train, plan, batch_size, row_length, pad_id), config.seed)
    batches = None
    if validation is not None:
        plan = plan_rows(validation.lengths, row_length, packing=False, seed=config.seed)
        batches = Batches(_Rows(validation, plan, eval_batch_size or batch_size, row_length, pad_id))
    report = DataReport(
        dataset=source.name,
        format=source.format,
        ignored_columns=source.ignored_columns,
        rows=rows,
        skipped=skipped + tuple(reason for examples in both for reason in examples.skipped),
        dropped=sum(examples.dropped for examples in both),
        truncated_sources=sum(examples.truncated_sources for examples in both),
        truncated_targets=sum(examples.truncated_targets for examples in both),
        unknown_tokens=sum(examples.unknown_tokens for examples in both),
        examples=len(train),
        tokens=len(train.input_ids),
        loss_tokens=int(train.loss.sum()),
        longest=longest,
        row_length=row_length,
        rows_per_epoch=stream.rows_per_epoch,
        steps_per_epoch=stream.steps_per_epoch,
        validation_examples=0 if validation is None else len(validation),
    )
    return TrainingData(stream, batches, report)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, limits: Limits, source: Examples, *, progress: bool, skip_bad: bool
) -> TokenizedExamples:
    try:
        return tokenize_examples(tokenizer, source.examples, source.where, limits, skip_bad=skip_bad, progress=progress)
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from error


def _split(source: Examples, val_size: float, seed: int) -> tuple[Examples, Examples]:
    """Training and held-out examples, drawn from the seed, each in file order."""
    total = len(source.examples)
    count = int(val_size) if val_size >= 1 else max(1, round(total * val_size))
    if count >= total:
        raise DataError(f"{source.name}: val_size {val_size} leaves none of the {total} examples for training")
    order = np.random.default_rng([seed, 2]).permutation(total)
    return _select(source, sorted(order[count:].tolist())), _select(source, sorted(order[:count].tolist()))


def _select(source: Examples, indices: Sequence[int]) -> Examples:
    return replace(
        source,
        examples=tuple(source.examples[index] for index in indices),
        where=tuple(source.where[index] for index in indices),
    )
