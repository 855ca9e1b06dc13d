"""Measure a model: exact match by greedy generation, MMLU by option likelihood, perplexity on text.

    python evaluate.py                                                 the shipped model on its own held-out rows
    python evaluate.py --model output/merged --tasks gsm8k mmlu        a merged folder, with the offset beside it
    python evaluate.py --model path/to/base --adapter output/adapter --tasks viggo:path/to/viggo perplexity:text.txt
    python evaluate.py --help                                          all settings

Prints a table; --output writes it as JSON with all that is needed to repeat it, --write_out what came of every row.
Exit status: 0; 2 for an error, told in a sentence; 130 when interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import convert
from lotaqaf_jax.errors import LotaError
from lotaqaf_jax.evaluation import EvalConfig, load_task, parse_eval_config
from lotaqaf_jax.evaluation.record import check_outputs, make_record, table, write_record, write_rows
from lotaqaf_jax.models import Decoder, local_folder
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.models.pretrained import load_tokenizer
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.training.compilation import use_compilation_cache


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into a sentence and an exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(parse_eval_config(argv), argv)
    except LotaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def run(config: EvalConfig, argv: Sequence[str]) -> None:
    """The job: load -> measure -> print and write."""
    started = time.perf_counter()
    check_outputs(config)
    use_compilation_cache()

    # Load: data first, since it is quick and most mistakes are there.
    tasks = [load_task(name, config) for name in config.tasks]
    folder = local_folder(str(config.model))
    adapter = None if config.adapter is None else Path(config.adapter)
    tokenizer = load_tokenizer(folder)
    model = open_model(folder, adapter, config.compute_dtype)

    results = [task.run(model, tokenizer) for task in tasks]

    print(table(results))
    for one in results:
        print(f"{one.task.label}: " + ", ".join(f"{name} {count:,}" for name, count in one.result.counts.items()))
    if config.output is not None:
        write_record(config.output, make_record(config, argv, folder, adapter, results))
        print(f"results   {config.output}")
    if config.write_out is not None:
        write_rows(config.write_out, results)
        print(f"rows      {config.write_out}")
    print(f"time      {time.perf_counter() - started:.0f} s")


def open_model(folder: Path, adapter: Path | None, dtype: object) -> Decoder:
    """The model of a folder, quantised or 16-bit: with the offsets that lie in it, or with an adapter."""
    if adapter is None:
        return convert.load_merged(folder, dtype=dtype)
    base = CheckpointFolder(folder)
    return convert.load_adapter(load_decoder(base, dtype), adapter, base=base)


if __name__ == "__main__":
    sys.exit(main())
