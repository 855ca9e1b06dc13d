"""Checkpoints of a run in progress (Orbax v1): adapters, optimizer state, and the place in data and log."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.parallel.processes import barrier, is_main
from lotaqaf_jax.training.step import TrainState

__all__ = ["RunCheckpoints", "saved_steps"]

# Orbax fails with OSError for its own files and with ValueError for those of TensorStore, whatever the reason.
_CANNOT_WRITE = (OSError, ValueError, RuntimeError)
_DROPPED = ".dropped-"


def saved_steps(directory: str | Path) -> list[int]:
    """The steps of which ``directory`` holds a checkpoint, in order; none where there is no such folder."""
    directory = Path(directory)
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


class RunCheckpoints:
    """The checkpoints of one run, in ``directory/<step>``, the newest ``keep`` of them.

    Orbax writes a checkpoint beside its place and renames it when it is whole, and only then removes the oldest, so
    that a run that is killed while it saves goes on from the one before. A context manager; leaving it waits for a
    checkpoint that is being written.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        """Open ``directory``, which need not exist.

        Args:
            directory: where the checkpoints are.
            keep: how many to keep.
        """
        from orbax.checkpoint.experimental.v1 import training

        # Orbax tells of every file at level INFO and warns that v1 is young; neither is the user's business.
        # Errors are raised too, and told once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._writing: int | None = None
        for left in self.directory.glob(f"{_DROPPED}*") if is_main() else ():
            shutil.rmtree(left, ignore_errors=True)
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
            CheckpointError: this checkpoint, or the one before it that was still being written, cannot be written,
                as when the disk is full; earlier checkpoints stay.
        """
        try:
            # Orbax skips a save, without a word, while another one is still being written.
            self._orbax.wait()
            self._writing = int(state.step)
            self._orbax.save_async(self._writing, _plain(state), custom_metadata=place, force=True)
            if wait:
                self._orbax.wait()
        except _CANNOT_WRITE as problem:
            raise self._failed(problem) from problem

    def _failed(self, problem: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}: the checkpoint of step {self._writing} could not be written ({problem}). Free some "
            "space, or see to what else is named; earlier checkpoints are whole, and the run can go on from them."
        )

    def find(self, which: str) -> int | None:
        """The step that ``which`` names: "latest" (or "true"), "auto", a step, or the path of a checkpoint.

        Returns:
            The step; with "auto" None where there is no checkpoint.

        Raises:
            ConfigError: there is no such checkpoint; says which there are.
        """
        steps = saved_steps(self.directory)
        if which.lower() in ("latest", "true", "auto") and steps:
            return steps[-1]
        if which.lower() == "auto":
            return None
        name = Path(which).name
        if name.isdecimal() and int(name) in steps and Path(which).absolute().parent in (self.directory, Path.cwd()):
            return int(name)
        have = f"it holds steps {', '.join(map(str, steps))}" if steps else "it holds no checkpoint"
        raise ConfigError(f"--resume_from_checkpoint {which}: not a checkpoint of {self.directory}; {have}.")

    def load(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Load the checkpoint of ``step``.

        Args:
            step: which.
            like: a state of the same structure, whose arrays say shapes, types and places.

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
        leaves = map(_placed, jax.tree.leaves(plain), jax.tree.leaves(like))
        return jax.tree.unflatten(jax.tree.structure(like), leaves), dict(place or {})

    def begin_after(self, step: int) -> None:
        """Leave no checkpoints but those that a run has that has just saved ``step``.

        Later ones go, which the run is going to write again: without them no other checkpoint is ever in the way of
        one, and none is ahead of the log. So do those that were to be removed when the run was killed, some of their
        files perhaps being gone already. Of several processes the main one removes, and all call this.
        """
        steps = saved_steps(self.directory) if is_main() else []
        kept = [one for one in steps if one <= step][-self._keep :]
        for one in set(steps) - set(kept):
            # Renamed first, so that whatever has the name of a step is whole.
            dropped = self.directory / f"{_DROPPED}{one}"
            (self.directory / str(one)).rename(dropped)
            shutil.rmtree(dropped, ignore_errors=True)
        barrier("later checkpoints are gone")
        self._orbax.reload()

    def close(self) -> None:
        """Wait for a checkpoint that is being written.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints stay.
        """
        try:
            self._orbax.close()
        except _CANNOT_WRITE as problem:
            raise self._failed(problem) from problem

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # What went wrong first is what the user has to hear of.
                raise


def _plain(state: TrainState) -> dict[str, Any]:
    """The arrays of a state as a flat dict in the order of its leaves: what is on disk does not depend on Flax."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _placed(leaf: jax.Array, like: jax.Array) -> jax.Array:
    """``leaf`` as free to move between devices as ``like`` is.

    JAX compiles another program for arrays that are committed to a device, as Orbax's are, than for those that are not.
    A resumed run has to find the programs of the run that it goes on with: others may round otherwise.
    """
    return leaf if like.committed else jnp.asarray(np.asarray(leaf))


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None))
