"""What the steps give, read from the device one step late, so that the device never waits for the reader."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from lotaqaf_jax.errors import TrainingError
from lotaqaf_jax.models import Decoder, MoveCounts, adapter_statistics
from lotaqaf_jax.training.step import Metrics, nonfinite_tensors

__all__ = ["Clock", "Results"]


class Clock:
    """Tokens per second since the last question, without the first step, by the time at which results are there."""

    def __init__(self) -> None:
        self._tokens = 0
        self._start: float | None = None
        self._rate = math.nan

    def add(self, tokens: int) -> None:
        """The results of a step over ``tokens`` tokens have just been read."""
        if self._start is None:
            self.restart()
        else:
            self._tokens += tokens

    def restart(self) -> None:
        """Count from now."""
        self._tokens, self._start = 0, time.perf_counter()

    def rate(self) -> float | None:
        """Tokens per second; None while there is nothing to tell."""
        if self._start is not None and self._tokens:
            self._rate = self._tokens / (time.perf_counter() - self._start)
            self.restart()
        return None if math.isnan(self._rate) else round(self._rate, 1)


@dataclasses.dataclass(frozen=True)
class _Unread:
    step: int
    metrics: Metrics
    counts: MoveCounts | None


class Results:
    """The results of steps that have been queued, and what is to happen when they are there."""

    def __init__(self, model: Decoder, done: Callable[[int, dict[str, Any] | None], None]) -> None:
        """Begin with none.

        Args:
            model: gives names and sizes; its adapters are not looked at.
            done: (step, record) is called for every step in turn, once its results are known to be finite. ``record``
                holds the numbers of a log line, or is None where none was asked for.
        """
        self._model = model
        self._done = done
        self._unread: collections.deque[_Unread] = collections.deque()
        self.clock = Clock()

    def add(self, step: int, metrics: Metrics, counts: MoveCounts | None = None) -> None:
        """A step has been queued.

        Args:
            step: its number.
            metrics: what it will give.
            counts: of the adapters after it (:func:`lotaqaf_jax.models.count_moves`), which asks for a log line.
        """
        self._unread.append(_Unread(step, metrics, counts))

    def read(self, *, leave: int = 0) -> None:
        """Wait for all steps but the last ``leave``.

        Raises:
            TrainingError: the loss or a gradient of a step is NaN or infinite; names step and tensor.
        """
        while len(self._unread) > leave:
            self._read(self._unread.popleft())

    def _read(self, one: _Unread) -> None:
        metrics = one.metrics
        *numbers, changed = jax.device_get((metrics.loss, metrics.grad_norm, metrics.tokens, metrics.changed))
        loss, norm, tokens = (array.item() for array in numbers)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = list(nonfinite_tensors(self._model, metrics.squares))
            raise TrainingError(_blame(one.step, loss, norm, names))
        self.clock.add(tokens)
        record = None
        if one.counts is not None:
            record = {"loss": loss, "grad_norm": norm} | ({} if changed is None else {"changed": changed.item()})
            record |= _shares(self._model, one.counts) | {"tokens_per_second": self.clock.rate()}
        self._done(one.step, record)


def _shares(model: Decoder, counts: MoveCounts) -> dict[str, float]:
    """Share of integer weights that the adapters move, and mean |mu| in steps of the grid, over all adapted layers.

    Nothing for LoRA, whose adapters do neither.
    """
    every = adapter_statistics(model, counts).values()
    if not every:
        return {}
    moved, integers = sum(one.moved for one in every), sum(one.integers for one in every)
    return {"moved": moved / integers, "mean_abs_mu": sum(one.mu for one in every) / sum(one.offsets for one in every)}


def _blame(step: int, loss: float, norm: float, names: list[str]) -> str:
    where = f"The gradient of {names[0]} and {len(names) - 1} more is not finite." if names else "No gradient is NaN."
    return (
        f"step {step}: loss {loss}, gradient norm {norm}. {where} "
        "Nothing of this step was saved; look at the rows of this batch, or go on from an earlier "
        "checkpoint with another --seed or with --dtype float32."
    )
