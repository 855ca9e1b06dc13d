"""Batches on the device before the step that takes them is there, each with the place in the data behind it."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax

from lotaqaf_jax.data import BatchStream

__all__ = ["Feed"]


class Feed:
    """The next batches of a stream, on their way to the device or there.

    The stream runs ahead of the steps, so its own place is not that of the run: every batch comes with the place
    behind it, which is what a checkpoint after its step has to say. (Grain's ``experimental.device_put`` would do the
    same with threads and larger buffers; a batch is made in far less than a step takes, so neither is needed.)
    """

    def __init__(
        self,
        stream: BatchStream,
        count: int,
        put: Callable[[Any], dict[str, jax.Array]] = jax.device_put,
        *,
        depth: int = 2,
    ) -> None:
        """Begin with the first batches.

        Args:
            stream: is moved on by ``count`` batches in all and no further.
            count: how many batches will be taken.
            put: starts a batch on its way to the device, or devices.
            depth: how many to keep ahead. Two, because on a GPU a transfer waits for the work queued before it: the
                batch of step n + 2, sent when step n has been queued, travels while step n + 1 runs.
        """
        self._stream = stream
        self._put = put
        self._left = count
        self._depth = depth
        self._ahead: collections.deque[tuple[dict[str, jax.Array], dict[str, Any]]] = collections.deque()
        self.fill()

    def fill(self) -> None:
        """Make batches and start their transfer until ``depth`` are ahead; returns without waiting for the device."""
        while self._left and len(self._ahead) < self._depth:
            batch = self._put(next(self._stream))
            self._ahead.append((batch, self._stream.state()))
            self._left -= 1

    def take(self) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The next batch, and the stream's :meth:`~lotaqaf_jax.data.BatchStream.state` behind it.

        Raises:
            IndexError: all ``count`` batches were taken, or :meth:`fill` was not called in time.
        """
        return self._ahead.popleft()
