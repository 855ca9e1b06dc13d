"""The folder that a run writes to."""

from __future__ import annotations

import shutil
from pathlib import Path

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.parallel.processes import barrier, is_main
from lotaqaf_jax.training.config import TrainConfig

__all__ = ["WRITTEN", "prepare_output"]

# All that a run writes; nothing else is ever removed from an output_dir.
WRITTEN = ("adapter", "merged", "checkpoints", "runs", "trainer_log.jsonl", "training_loss.png")


def prepare_output(config: TrainConfig) -> None:
    """Make ``output_dir`` ready: new or empty, or cleared of an earlier run, or kept to go on from.

    Of several processes the main one does it, and all return when it is done.

    Raises:
        ConfigError: it is a file, or not empty and neither ``overwrite_output_dir`` nor ``resume_from_checkpoint`` is
            given.
    """
    if is_main():
        _prepare(config)
    barrier("output_dir is ready")


def _prepare(config: TrainConfig) -> None:
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output}: is a file. Name a folder.")
    if config.resume_from_checkpoint:
        if not (output / "checkpoints").is_dir():
            raise ConfigError(f"--resume_from_checkpoint: {output} holds no checkpoints. Name the run's --output_dir.")
        return
    if not output.exists() or not any(output.iterdir()):
        return
    if not config.overwrite_output_dir:
        raise ConfigError(
            f"--output_dir {output}: not empty. Name another folder, or pass --overwrite_output_dir to replace an "
            "earlier run, or --resume_from_checkpoint latest to go on with it."
        )
    for name in WRITTEN:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
