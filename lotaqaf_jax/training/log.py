"""What a run says: trainer_log.jsonl, TensorBoard or Weights & Biases, and a plot of the loss."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.parallel.processes import is_main

__all__ = ["RunLog", "plot_log", "read_log"]


class RunLog:
    """Appends records to ``trainer_log.jsonl``, one JSON object a line with its ``step``, and passes them on.

    Of several processes the main one does; the others write nothing.
    """

    def __init__(self, path: str | Path, *, report_to: str = "none", resume_step: int | None = None) -> None:
        """Open the log.

        Args:
            path: the file.
            report_to: "none", "tensorboard" (writes to ``runs/`` beside the file) or "wandb".
            resume_step: keep the records up to this step and go on after them; None starts anew.

        Raises:
            ConfigError: the package that ``report_to`` needs is not installed.
        """
        self.path = Path(path)
        self._file: TextIO | None = None
        if not is_main():
            return
        kept = [] if resume_step is None else [entry for entry in read_log(self.path) if entry["step"] <= resume_step]
        beside = self.path.with_suffix(".partial")
        beside.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(beside, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._reporter = _reporter(report_to, self.path.parent, resume_step)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append ``record`` under ``step``; it is on disk when this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        if self._reporter is not None:
            self._reporter(step, {key: value for key, value in record.items() if isinstance(value, int | float)})

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _reporter(report_to: str, directory: Path, resume_step: int | None) -> Any:
    """A function (step, numbers) that passes records on, or None."""
    if report_to == "none":
        return None
    try:
        if report_to == "tensorboard":
            from tensorboardX import SummaryWriter

            # TensorBoard hides what was written from the purged step on, as the log is cut behind it.
            purged = None if resume_step is None else resume_step + 1
            writer = SummaryWriter(str(directory / "runs"), purge_step=purged)

            def to_tensorboard(step: int, numbers: dict[str, float]) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            return to_tensorboard
        import wandb
    except ImportError as missing:
        raise ConfigError(
            f"--report_to {report_to}: package {missing.name} is not installed; pip install 'lotaqaf_jax[{report_to}]'."
        ) from None
    run = wandb.init(project="lotaqaf_jax", dir=str(directory))
    return lambda step, numbers: run.log(numbers, step=step)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that was cut off while it was written is left out."""
    records = []
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_log(path: str | Path, picture: str | Path) -> None:
    """Draw training and held-out loss over the steps, and the share of moved integers where the log has it.

    Args:
        path: the log.
        picture: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(path)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    moved = [(r["step"], 100 * r["moved"]) for r in records if "moved" in r]
    held = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if train:
        axes.plot([r[0] for r in train], [r[1] for r in train], label="training loss", linewidth=1.2)
    if held:
        axes.plot([r[0] for r in held], [r[1] for r in held], "o-", label="held-out loss", linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per target token")
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    if moved:
        right = axes.twinx()
        right.plot([r[0] for r in moved], [r[1] for r in moved], "--", color="grey", label="integers moved")
        right.set_ylabel("% of integer weights moved")
        right.set_ylim(bottom=0)
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.legend(handles, labels, loc="center right")
    beside = Path(picture).with_suffix(".partial.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, picture)
