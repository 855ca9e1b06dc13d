"""The paper's table in miniature: every row of docs/results.md, from 16-bit models to Markdown and plots.

    python benchmarks/table.py --data ../shared/data --output runs/table [--jobs 8] [--sources base14m] [--minutes 20]

Quantises the models, tunes one setting of every row on validation rows (the learning rate; on tasks LoTA-QAF's share
of integers to move), runs every cell with three seeds by train.py, measures tasks by evaluate.py, and writes
results.jsonl, table.md and plots into --output. A cell that is in results.jsonl already is not run again, so an
interrupted table goes on with the same command; docs/results.jsonl has those of docs/results.md. --jobs processes share
the device.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the card

from table_plan import BITS, ROWS, SOURCES, TASKS, Run, main_runs, prepare, quantized_folder, tuning_runs
from table_report import best_values, write_report
from tqdm import tqdm

PHASES = ("tuning", "table")
# Zero points as in the runs of docs/results.jsonl, whose models are told apart by a hash of all that is stored.
CALIBRATION = ("--samples", "256", "--length", "256", "--asym", "--checkpoint_format", "gptq_v2")


def main() -> None:
    """Quantise, tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with models and datasets")
    parser.add_argument("--output", type=Path, required=True, help="where everything is written")
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--group_sizes", nargs="+", type=int, help="only these")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--cards", type=int, default=1, help="GPUs to share the processes out to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument("--results", type=Path, help="the file of results, if not results.jsonl in --output")
    parser.add_argument("--commit", help="what results say of the version that made them; by default git's")
    parser.add_argument("--report", action="store_true", help="only write table and plots of what is there")
    options = parser.parse_args()
    options.end = time.monotonic() + 60 * options.minutes
    options.commit = options.commit or _commit()
    options.results = options.results or options.output / "results.jsonl"
    root, results = options.output, options.results
    root.mkdir(parents=True, exist_ok=True)
    if not options.report:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 * options.cards / options.jobs:.3f}")
        prepare(options.data, root / "data")
        context = multiprocessing.get_context("spawn")
        # A process ends after some runs: memory, and faults of the runtime that stay, end with it.
        with context.Pool(options.jobs, _take_card, (context.Value("i"), options.cards), maxtasksperchild=12) as pool:
            runs = _wanted(tuning_runs(options.sources), options) if "tuning" in options.phases else []
            todo = [run for run in runs if run.name not in read_results(results)]
            models = {quantized_folder(root, run): run for run in _every_cell(options)}
            pool.starmap(quantize, [(run, root, options.data) for run in models.values()], chunksize=1)
            execute(pool, todo, options, "tuning")
            best = best_values(read_results(results).values())
            runs = _wanted(main_runs(options.sources, best), options) if "table" in options.phases else []
            execute(pool, [run for run in runs if run.name not in read_results(results)], options, "table")
    write_report(list(read_results(results).values()), root)
    print((root / "table.md").read_text(encoding="utf-8"))


def _commit() -> str:
    """The short hash of the checkout; "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _take_card(started: Any, cards: int) -> None:
    """In a new process, before JAX starts: one card of several, in turn."""
    with started.get_lock():
        place = started.value
        started.value += 1
    if cards > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % cards)


def _wanted(runs: Iterable[Run], options: argparse.Namespace) -> list[Run]:
    """Those of the tasks, rows and group sizes that were asked for."""
    sizes = options.group_sizes
    return [
        run
        for run in runs
        if run.task in options.tasks
        and run.row in options.rows
        and run.bits in (16, *options.bits)
        and (run.bits == 16 or sizes is None or run.group_size in sizes)
    ]


def _every_cell(options: argparse.Namespace) -> list[Run]:
    """A run of every quantised model."""
    sources = [SOURCES[name] for name in options.sources]
    return [
        Run(source.name, bits, group_size, source.tasks[0], "none", 0)
        for source in sources
        for bits in BITS
        for group_size in source.groups
        if options.group_sizes is None or group_size in options.group_sizes
    ]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by the name of the run."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["name"]: line for line in lines}


def execute(pool: Pool, runs: Sequence[Run], options: argparse.Namespace, title: str) -> None:
    """Run all, and append each result as it comes."""
    one = functools.partial(run_one, root=options.output, data=options.data, end=options.end)
    with options.results.open("a", encoding="utf-8") as file:
        for result in tqdm(pool.imap_unordered(one, runs), total=len(runs), desc=title):
            if result is not None:
                file.write(json.dumps({**result, "commit": options.commit}) + "\n")
                file.flush()


def quantize(run: Run, root: Path, data: Path) -> None:
    """Make the quantised model of a run, once: asymmetric, calibrated on the text that the plan names."""
    import convert.__main__ as convert

    folder = quantized_folder(root, run)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = SOURCES[run.source]
    text = data / source.calibration if "/" in source.calibration else root / "data" / source.calibration
    flags = ["--model", str(data / source.folder), "--calibration", str(text), *CALIBRATION]
    flags += ["--bits", str(run.bits), "--group_size", str(run.group_size), "--output", str(folder)]
    log = (root / "models" / f"{folder.name}.log").open("w", encoding="utf-8")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = convert.main(["quantize", *flags])
    if status:
        raise RuntimeError(f"{folder}: quantising ended with status {status}, see {folder}.log")


def run_one(run: Run, root: Path, data: Path, end: float) -> dict[str, Any] | None:
    """One run and its result; None where it failed, where it is too late to begin, or another process is at it."""
    if time.monotonic() > end:
        return None
    log = run.folder(root).parent / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{run.name}: another process is at it", file=sys.stderr)
            return None
        file.truncate(0)
        folders = [run.folder(root, i) for i in range(ROWS[run.row].rounds)]
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                seconds = _train_and_measure(run, root, data, folders)
        except Exception as error:  # the others go on
            traceback.print_exc(file=file)
            print(f"{run.name} failed: {str(error)[:200]}; see {log}", file=sys.stderr)
            return None
        result = {"name": run.name, **vars(run), "seconds": round(seconds, 1), **read_run(folders)}
        if run.bits != 16:
            from convert.fingerprint import fingerprint
            from lotaqaf_jax.quant.folder import CheckpointFolder

            result["base"] = fingerprint(CheckpointFolder(quantized_folder(root, run)), progress=False)[:20]
        for folder in folders:
            shutil.rmtree(folder)
        return result


def _train_and_measure(run: Run, root: Path, data: Path, folders: Sequence[Path]) -> float:
    """Seconds that the rounds of training took.

    Raises:
        RuntimeError: train.py or evaluate.py ended with a status that is not 0.
    """
    import evaluate
    import train

    started = time.perf_counter()
    for i, folder in enumerate(folders):
        shutil.rmtree(folder, ignore_errors=True)
        flags = run.flags(root, data, i)
        if status := train.main(flags):
            raise RuntimeError(f"train.py ended with status {status}")
    seconds = time.perf_counter() - started
    if TASKS[run.task].rule and (status := evaluate.main(_measure_flags(flags, folders[-1]))):
        raise RuntimeError(f"evaluate.py ended with status {status}")
    return seconds


def _measure_flags(flags: Sequence[str], folder: Path) -> list[str]:
    """Of evaluate.py, after train.py ran with ``flags``: the merged folder, or without one base and adapter."""
    merged = folder / "merged"
    model = (
        [str(merged)] if merged.exists() else [flags[flags.index("--model") + 1], "--adapter", str(folder / "adapter")]
    )
    task = flags[flags.index("--eval_dataset") + 1]
    return ["--model", *model, "--tasks", task, "--batch_size", "64", "--output", str(folder / "evaluation.json")]


def read_run(rounds: Sequence[Path]) -> dict[str, Any]:
    """What the rounds of a run left: the looks before the first and after the last; of the last what moved in it, and
    the size of what was written."""
    logs = [(folder / "trainer_log.jsonl").read_text(encoding="utf-8") for folder in rounds]
    lines = [json.loads(line) for log in logs for line in log.splitlines()]
    folder = rounds[-1]
    looks = [line for line in lines if "eval_loss" in line]
    last = [line for line in lines if "loss" in line][-1]
    found = {"before": _numbers(looks[0]), "after": _numbers(looks[-1])}
    found |= {name: round(last[name], 6) for name in ("moved", "mean_abs_mu") if name in last}
    if (folder / "evaluation.json").exists():
        record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        found["exact_match"] = record["results"][0]["measures"]["exact_match"]
    if (folder / "merged").exists():
        found["merged_bytes"] = sum(file.stat().st_size for file in (folder / "merged").glob("**/*.safetensors"))
    return found


def _numbers(look: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): round(value, 6) for name, value in look.items() if name.startswith("eval_")}


if __name__ == "__main__":
    main()
