"""The folder that a run writes to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.parallel.processes import barrier, is_main
from lotaqaf_jax.training.checkpoints import saved_steps
from lotaqaf_jax.training.config import TrainConfig

__all__ = ["SETTINGS", "WRITTEN", "prepare_output"]

SETTINGS = "settings.json"
"""The settings that decide the numbers of the run that the folder is of."""

# All that a run writes; nothing else is ever removed from an output_dir.
WRITTEN = ("checkpoints", SETTINGS, "adapter", "merged", "runs", "trainer_log.jsonl", "training_loss.png")
# What a killed run may leave of files that it had not finished, and of checkpoints on their way out.
_UNFINISHED = ("settings.partial", "trainer_log.partial", "training_loss.partial.png", "checkpoints.dropped")


def prepare_output(config: TrainConfig) -> None:
    """Make ``output_dir`` ready: new or empty, or cleared of an earlier run, or kept to go on from.

    With ``resume_from_checkpoint="auto"`` a run that was killed before its first checkpoint begins again: its folder is
    known by the settings in it. However far this function came before it was killed, the same settings take it on.

    Of several processes the main one does it, and all return when it is done.

    Raises:
        ConfigError: it is a file, or not empty and neither ``overwrite_output_dir`` nor ``resume_from_checkpoint`` is
            given, or with "auto" it is of another run.
    """
    if is_main():
        _prepare(config)
    barrier("output_dir is ready")


def _prepare(config: TrainConfig) -> None:
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output}: is a file. Name a folder.")
    auto = str(config.resume_from_checkpoint).lower() == "auto"
    if config.resume_from_checkpoint and not auto and not (output / "checkpoints").is_dir():
        raise ConfigError(f"--resume_from_checkpoint: {output} holds no checkpoints. Name the run's --output_dir.")
    for name in _UNFINISHED:
        _remove(output / name)
    if config.resume_from_checkpoint and (saved_steps(output / "checkpoints") or not auto):
        return
    begun = auto and _begun(output, config)
    if output.exists() and any(output.iterdir()) and not begun and not config.overwrite_output_dir:
        raise ConfigError(
            f"--output_dir {output}: not empty"
            + (", holds no checkpoint, and was not begun with these settings" if auto else "")
            + ". Name another folder, or pass --overwrite_output_dir to replace an earlier run"
            + ("." if auto else ", or --resume_from_checkpoint latest to go on with it.")
        )
    output.mkdir(parents=True, exist_ok=True)
    # Checkpoints go first, all at once: none of an earlier run may be found in a folder that has the new settings.
    if (output / "checkpoints").exists():
        (output / "checkpoints").rename(output / "checkpoints.dropped")
    beside = output / "settings.partial"
    beside.write_text(json.dumps(config.decisive(), indent=2) + "\n", encoding="utf-8")
    os.replace(beside, output / SETTINGS)
    _remove(output / "checkpoints.dropped")
    for name in WRITTEN:
        # What the same run has exported already stays until it is exported again.
        if name != SETTINGS and not (begun and name in ("adapter", "merged")):
            _remove(output / name)


def _begun(output: Path, config: TrainConfig) -> bool:
    """Whether a run of these settings has begun in ``output``."""
    try:
        return not config.differences(json.loads((output / SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
