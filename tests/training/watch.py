"""A training step that tells what the loop does with it, and that can be made to fail or to be slow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lotaqaf_jax.data import BatchStream
from lotaqaf_jax.training import loop
from lotaqaf_jax.training.step import Metrics


class Watch:
    """Stands between the loop and the compiled step.

    Attributes:
        events: in order, without repetitions in a row: ("queue", n) step n was queued; ("batch", n) batch n was taken
            from the stream; ("read", n) a result of step n was read on the host; ("read", None) anything else was.
            Tests may add their own.
        change: for some steps a function that gives other metrics.
        at: for some steps something to do when the step is queued.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int | None]] = []
        self.change: dict[int, Callable[[Metrics], Metrics]] = {}
        self.at: dict[int, Callable[[], None]] = {}
        self._results: list[list[jax.Array]] = []
        self._batches = 0
        make, following = loop.make_train_step, BatchStream.__next__
        array = type(jnp.zeros(()))
        value = array._value

        def watched(*arguments: Any, **more: Any) -> Any:
            jitted = make(*arguments, **more)
            return SimpleNamespace(
                lower=lambda *given: SimpleNamespace(compile=lambda: self._program(jitted.lower(*given).compile()))
            )

        def taken(stream: BatchStream) -> Any:
            self._batches += 1
            self.note("batch", self._batches)
            return following(stream)

        def read(one: jax.Array) -> Any:
            numbers = [n for n, leaves in enumerate(self._results, 1) if any(one is leaf for leaf in leaves)]
            self.note("read", numbers[0] if numbers else None)
            return value.fget(one)

        monkeypatch.setattr(loop, "make_train_step", watched)
        monkeypatch.setattr(BatchStream, "__next__", taken)
        # What float(), int(), np.asarray() and jax.device_get() of an array all come to.
        monkeypatch.setattr(array, "_value", property(read))

    def note(self, what: str, number: int | None) -> None:
        if self.events[-1:] != [(what, number)]:
            self.events.append((what, number))

    def order(self, *kinds: str) -> list[tuple[str, int | None]]:
        """The events of these kinds, and of results those that belong to a step."""
        return [event for event in self.events if event[0] in kinds and event != ("read", None)]

    def _program(self, compiled: Any) -> Any:
        outer = self

        class Program:
            memory_analysis = staticmethod(compiled.memory_analysis)

            def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
                step = len(outer._results) + 1
                outer.at.get(step, lambda: None)()
                state, metrics = compiled(state, frozen, batch)
                metrics = outer.change.get(step, lambda same: same)(metrics)
                outer.note("queue", step)
                outer._results.append(jax.tree.leaves(metrics))
                return state, metrics

        return Program()


def spoiled(metrics: Metrics) -> Metrics:
    """As of a step in which one tensor's gradient, and the norm with it, is NaN."""
    squares = jax.tree.map(lambda leaf: leaf, metrics.squares)
    leaf = squares["segments"][0]["mlp"]["up_proj"]["adapter"]
    value = leaf.get_value()
    leaf.set_value(dataclasses.replace(value, b=value.b.at[1].set(jnp.nan)))
    return dataclasses.replace(metrics, grad_norm=metrics.grad_norm * jnp.nan, squares=squares)


TENSOR = "model.layers.1.mlp.up_proj.lota_B"
"""The tensor that :func:`spoiled` spoils."""
