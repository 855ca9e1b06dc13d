"""Checkpoints of a run in progress (Orbax v1): adapters, optimizer state, and the place in data and log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.training.step import TrainState

__all__ = ["RunCheckpoints"]


class RunCheckpoints:
    """The checkpoints of one run, in ``directory/<step>``, the newest ``keep`` of them.

    Orbax writes a checkpoint beside its place and renames it when it is whole, so that a run that is killed while it
    saves goes on from the one before.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        """Open ``directory``, which need not exist.

        Args:
            directory: where the checkpoints are.
            keep: how many to keep.
        """
        from orbax.checkpoint.experimental.v1 import training

        # Orbax tells of every file at level INFO and warns that v1 is young; neither is the user's business.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = Path(directory).absolute()
        self._orbax = training.Checkpointer(
            self.directory,
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, state: TrainState, place: dict[str, Any], *, wait: bool = False) -> None:
        """Save ``state`` under its step, in the background.

        Args:
            state: what a step changes.
            place: small JSON-like dict: state of the data stream, settings of the run.
            wait: return only when the checkpoint is whole.

        Raises:
            CheckpointError: the disk is full or cannot be written to; earlier checkpoints stay.
        """
        try:
            self._orbax.save_async(int(state.step), _plain(state), custom_metadata=place, overwrite=True)
            if wait:
                self._orbax.wait()
        except OSError as problem:
            raise CheckpointError(
                f"{self.directory}: the checkpoint of step {int(state.step)} could not be written ({problem}). "
                "Free some space; earlier checkpoints are whole."
            ) from problem

    def find(self, which: str) -> int:
        """The step that ``which`` names: "latest" (or "true"), a step, or the path of a checkpoint.

        Raises:
            ConfigError: there is no such checkpoint; says which there are.
        """
        steps = sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)
        if which.lower() in ("latest", "true") and steps:
            return steps[-1]
        name = Path(which).name
        if name.isdecimal() and int(name) in steps and Path(which).absolute().parent in (self.directory, Path.cwd()):
            return int(name)
        have = f"it holds steps {', '.join(map(str, steps))}" if steps else "it holds no checkpoint"
        raise ConfigError(f"--resume_from_checkpoint {which}: not a checkpoint of {self.directory}; {have}.")

    def load(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Load the checkpoint of ``step``.

        Args:
            step: which.
            like: a state of the same structure, whose arrays say shapes and types.

        Returns:
            The state and the ``place`` that were saved.

        Raises:
            CheckpointError: the checkpoint is damaged or of another structure.
        """
        abstract = jax.tree.map(_abstract, _plain(like))
        try:
            plain = self._orbax.load(step, abstract)
            place = self._orbax.metadata(step).custom_metadata
        except (OSError, ValueError, KeyError) as problem:
            raise CheckpointError(
                f"{self.directory / str(step)}: cannot be loaded ({problem}). Resume from an earlier checkpoint."
            ) from problem
        leaves = jax.tree.leaves(plain)
        return jax.tree.unflatten(jax.tree.structure(like), leaves), dict(place or {})

    def close(self) -> None:
        """Wait for a checkpoint that is being written."""
        self._orbax.close()


def _plain(state: TrainState) -> dict[str, Any]:
    """The arrays of a state as a flat dict in the order of its leaves: what is on disk does not depend on Flax."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None))
