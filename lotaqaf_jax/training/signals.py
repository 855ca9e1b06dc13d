"""Ctrl-C and SIGTERM ask a run to stop after its step, rather than tear it down."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

__all__ = ["StopSignal"]


class StopSignal:
    """While entered, the first SIGINT or SIGTERM is noted in ``received``; a second one acts as usual."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

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
