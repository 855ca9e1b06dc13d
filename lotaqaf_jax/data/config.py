"""What a user can say about the data of one run."""

from __future__ import annotations

from dataclasses import dataclass

from lotaqaf_jax.errors import DataError

__all__ = ["DataConfig"]


@dataclass(frozen=True)
class DataConfig:
    """The dataset, how its rows become tokens, and in which order they come.

    Attributes:
        dataset: a file, a folder, a hub name (``owner/name`` or ``owner/name:subset``), a preset (``gsm8k``),
            or a preset with a file or folder (``gsm8k:path/to/folder``). :mod:`lotaqaf_jax.data.sources` has
            the rule.
        split: the split to train on, of a folder or hub dataset. A single file is read whole.
        format: one of ``lotaqaf_jax.data.FORMATS``; None finds it from the column names.
        eval_dataset: held-out rows, given like ``dataset``. None with ``eval_split`` set means ``dataset``.
        eval_split: the split of ``eval_dataset``; None means ``validation``.
        val_size: held-out rows taken out of ``dataset`` instead: a count (1, 2, ...) or a share (between 0
            and 1). 0 takes none.
        max_samples: use the first so many rows of ``dataset``; None uses all.
        max_eval_samples: the same for ``eval_dataset``.
        max_seq_length: tokens in a row of a batch, and so the most tokens of one example.
        max_source_length: most tokens of a prompt, template included; None sets no limit of its own.
        max_target_length: most tokens of one response, its end token included; None sets no limit of its own.
            The paper's setting is ``max_source_length=1024, max_target_length=256, max_seq_length=1280``.
        packing: put several examples into one row. They do not see each other.
        skip_bad_rows: leave out rows that cannot be used, and count them, instead of stopping at the first.
        seed: decides the order of the rows, the held-out rows of ``val_size`` and the packing; 0 to 2**32 -
            1.

    Raises:
        DataError: for a value out of range, and for two ways of naming the held-out rows at once.
    """

    dataset: str
    split: str = "train"
    format: str | None = None
    eval_dataset: str | None = None
    eval_split: str | None = None
    val_size: float = 0
    max_samples: int | None = None
    max_eval_samples: int | None = None
    max_seq_length: int = 1280
    max_source_length: int | None = None
    max_target_length: int | None = None
    packing: bool = False
    skip_bad_rows: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        minimum = {
            "max_samples": 1,
            "max_eval_samples": 1,
            "max_seq_length": 2,
            "max_source_length": 1,
            "max_target_length": 1,
        }
        for name, least in minimum.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name} is {value}; give {least} or more")
        if not self.dataset:
            raise DataError("dataset is empty; give a file, a folder, a hub name or a preset")
        if self.val_size < 0 or (self.val_size >= 1 and self.val_size != int(self.val_size)):
            raise DataError(f"val_size is {self.val_size}; give a count (1, 2, ...) or a share between 0 and 1")
        if self.val_size and self.has_eval_dataset:
            raise DataError("val_size and eval_dataset/eval_split both name the held-out rows; give only one of them")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"seed is {self.seed}; give a number from 0 to 2**32 - 1")

    @property
    def has_eval_dataset(self) -> bool:
        """Whether the held-out rows come from a dataset or split of their own."""
        return self.eval_dataset is not None or self.eval_split is not None
