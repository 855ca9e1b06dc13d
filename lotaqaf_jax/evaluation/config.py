"""The settings of an evaluation: one dataclass, its command line, and the checks that need no data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from lotaqaf_jax.assets import DEFAULT_HELDOUT, DEFAULT_MODEL
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models.pretrained import default_dtype

__all__ = ["EvalConfig", "parse_eval_config"]


def _help(text: str, default: Any) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class EvalConfig:
    """Settings of an evaluation; every field is a flag of ``evaluate.py``."""

    model: str | None = _help("folder, hub name or known name, base or merged; none: the shipped small model", None)
    adapter: str | None = _help("folder of an adapter to put on the model", None)
    tasks: list[str] = _help(
        "what to measure, each a name or name:path: gsm8k, sql, viggo, match, mmlu, perplexity, document_perplexity; "
        "match and the perplexities take any dataset; none: the shipped model's held-out rows",
        [],
    )
    split: str | None = _help("split of a folder or hub dataset to measure on; none: test, or else validation", None)
    limit: int | None = _help("only the first so many rows, windows, documents, or questions of a subject", None)
    batch_size: int = _help("rows that are computed at once", 8)
    max_new_tokens: int = _help("tokens that an answer may have; the paper's 256", 256)
    max_source_length: int | None = _help("most tokens of a prompt of gsm8k, sql, viggo, match; the paper's 1024", None)
    max_length: int | None = _help("most tokens of a prompt of mmlu; none: the model's context", None)
    window: int | None = _help("tokens of a window of perplexity; none: 2048, or the model's context if shorter", None)
    shots: int = _help("examples shown before a question of mmlu", 5)
    dtype: Literal["auto", "float32", "bfloat16"] = _help("type that is computed in; auto: by device", "auto")
    seed: int = _help("of the draws behind the intervals of perplexity; generation is greedy", 0)
    output: str | None = _help("file to write the results to, as JSON, with all that is needed to repeat them", None)
    write_out: str | None = _help("file to write every row's outcome to, as JSON lines", None)
    overwrite: bool = _help("replace these two files", False)

    def __post_init__(self) -> None:
        minimum = {
            "limit": 1,
            "batch_size": 1,
            "max_new_tokens": 1,
            "max_source_length": 1,
            "max_length": 8,
            "window": 2,
            "shots": 0,
            "seed": 0,
        }
        for name, least in minimum.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name}: found {value}, expected {least} or more.")
        if not self.tasks:
            if self.model is not None or self.adapter is not None:
                raise ConfigError("--tasks is missing. Name at least one, such as gsm8k or perplexity:file.txt.")
            self.tasks = [f"match:{DEFAULT_HELDOUT}"]
        self.model = str(DEFAULT_MODEL) if self.model is None else self.model

    @property
    def compute_dtype(self) -> Any:
        """The type that is computed in."""
        return default_dtype() if self.dtype == "auto" else self.dtype


def parse_eval_config(argv: Sequence[str]) -> EvalConfig:
    """Read the command line.

    Args:
        argv: arguments without the program's name.

    Raises:
        ConfigError: a value out of range.
        SystemExit: status 2 for a malformed command line, as argparse does; 0 for ``--help``.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(EvalConfig, allow_abbrev=False)
    parser.prog = "evaluate.py"
    parser.description = "Measure a model: exact match by generation, MMLU by option likelihood, perplexity on text."
    return EvalConfig(**vars(parser.parse_args(list(argv))))
