"""Ctrl-C and SIGTERM ask a run to stop after its step, rather than tear it down."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import jax

from lotaqaf_jax.parallel.processes import is_main

__all__ = ["StopSignal"]


_KEY, _AHEAD = "lotaqaf_jax/last step", 4


class StopSignal:
    """While entered, the first SIGINT or SIGTERM is noted in ``received``; a second one acts as usual.

    Several processes have to stop after the same step: what the main one receives counts, and it names the step to the
    others a few steps ahead. None of them is further on than that, since a step needs all of them, and its results are
    read before the one after the next is queued.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._last: int | None = None

    @property
    def status(self) -> int:
        """The exit status that says so."""
        return 128 + int(self.received or signal.SIGTERM)

    def by_all(self, step: int) -> bool:
        """Whether all processes stop after ``step``, which has been queued."""
        if jax.process_count() == 1:
            return self.received is not None
        if self._last is None:
            self._last = self._agreed(step)
        return self._last is not None and step >= self._last

    def _agreed(self, step: int) -> int | None:
        # The store by which the processes found each other; JAX has no public name for it yet.
        store: Any = jax._src.distributed.global_state.client
        if is_main():
            if self.received is None:
                return None
            store.key_value_set(_KEY, str(step + _AHEAD))
            return step + _AHEAD
        try:
            return int(store.key_value_try_get(_KEY))
        except jax.errors.JaxRuntimeError:  # Not set.
            return None

    def __enter__(self) -> StopSignal:
        for kind in (signal.SIGINT, signal.SIGTERM):
            self._before[kind] = signal.signal(kind, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for kind, before in self._before.items():
            signal.signal(kind, before)  # type: ignore[arg-type]

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
