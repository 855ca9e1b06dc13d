"""The device always has the next step queued, and nothing that the loop promises depends on it."""

from __future__ import annotations

import dataclasses
import os
import signal
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from lotaqaf_jax.errors import TrainingError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.training import Stopped, compilation, results
from lotaqaf_jax.training.checkpoints import RunCheckpoints
from lotaqaf_jax.training.feed import Feed
from lotaqaf_jax.training.log import read_log
from lotaqaf_jax.training.results import Results
from tests.training.test_loop import adapters, comparable, data_of, run, settings
from tests.training.watch import TENSOR, Watch, spoiled


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def saved_steps(output: Path) -> list[int]:
    folder = output / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def saved_place(output: Path, step: int) -> Any:
    """The place in the data that a checkpoint holds."""
    checkpoints = RunCheckpoints(output / "checkpoints")
    try:
        return checkpoints._orbax.metadata(step).custom_metadata["data"]
    finally:
        checkpoints.close()


def test_a_step_is_read_while_the_next_one_runs_and_the_step_is_compiled_once(
    adapted: Decoder,
    tiny_gptq: Path,
    rows: Path,
    tmp_path: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**36})
    monkeypatch.setattr(compilation, "jax", SimpleNamespace(local_devices=lambda: [card], errors=jax.errors))
    with jax.log_compiles():
        run(adapted, settings(tiny_gptq, rows, tmp_path / "out", logging_steps=100))
    compiled = [message for message in caplog.messages if message.startswith("Finished XLA compilation")]
    assert sum("train_step" in message for message in compiled) == 1
    printed = capsys.readouterr().out
    assert "compiled the step in" in printed
    assert "recomputing in the backward pass: products" in printed

    # From the second step, when all is compiled, to the last but one: no other reads, and a batch two steps ahead.
    begin, end = watch.events.index(("queue", 3)), watch.events.index(("queue", 6))
    expected = [(what, n + ahead) for n in (3, 4, 5) for what, ahead in (("queue", 0), ("batch", 2), ("read", -1))]
    assert watch.events[begin:end] == expected
    assert [event for event in watch.events if event[0] == "batch"] == [("batch", n) for n in range(1, 9)]


def test_whatever_looks_at_the_state_or_keeps_it_first_reads_all_steps(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(model: Decoder, title: str) -> dict[str, float]:
        watch.note("look", int(title.split()[-1]))
        return {"loss": 1.0}

    save = RunCheckpoints.save

    def noted(self: RunCheckpoints, state: Any, place: Any, **more: Any) -> None:
        watch.note("save", int(state.step))
        save(self, state, place, **more)

    monkeypatch.setattr(RunCheckpoints, "save", noted)
    run(adapted, settings(tiny_gptq, rows, tmp_path / "out", eval_steps=3, save_steps=5), evaluate=evaluate)
    order = watch.order("look", "save", "queue", "read")
    assert order[order.index(("queue", 3)) :][:5] == [
        ("queue", 3), ("read", 2), ("read", 3), ("look", 3), ("queue", 4),
    ]  # fmt: skip
    assert order[order.index(("queue", 5)) :][:5] == [
        ("queue", 5), ("read", 4), ("read", 5), ("save", 5), ("queue", 6),
    ]  # fmt: skip
    assert order[-4:] == [("queue", 8), ("read", 7), ("read", 8), ("look", 8)]
    fresh = data_of(settings(tiny_gptq, rows, tmp_path / "out")).train
    list(islice(fresh, 5))
    assert saved_place(tmp_path / "out", 5) == fresh.state()


@pytest.mark.parametrize("bad", [2, 3, 4, 8])
def test_nothing_of_a_bad_step_is_kept(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path, watch: Watch, bad: int
) -> None:
    """2: found when the next step is queued already; 3: to be looked at; 4: to be saved and logged; 8: the last."""
    watch.change[bad] = spoiled
    config = settings(tiny_gptq, rows, tmp_path / "out", logging_steps=2, eval_steps=3, save_steps=4)
    with pytest.raises(TrainingError, match=rf"^step {bad}: loss \d.*gradient norm nan.*{TENSOR} and 0 more"):
        run(adapted, config, evaluate=lambda model, title: {"loss": 1.0})
    records = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [n for n in (1, 2, 4, 6, 8) if n < bad]
    assert [record["step"] for record in records if "eval_loss" in record] == [n for n in (0, 3, 6, 8) if n < bad]
    assert saved_steps(tmp_path / "out") == [n for n in (4, 8) if n < bad]


def test_a_bad_step_is_not_kept_by_a_stop_either(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path, watch: Watch
) -> None:
    watch.change[3] = spoiled
    watch.at[3] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(TrainingError, match=f"step 3: .*{TENSOR}"):
        run(adapted, settings(tiny_gptq, rows, tmp_path / "out"))
    assert saved_steps(tmp_path / "out") == []


def test_a_run_that_dies_or_is_stopped_goes_on_at_its_place_in_the_data(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path, watch: Watch
) -> None:
    whole = settings(tiny_gptq, rows, tmp_path / "whole")
    expected = run(adapted, whole)
    parts = settings(tiny_gptq, rows, tmp_path / "parts", save_steps=3)
    # Dies in step 5 (the 13th of all), which leaves the checkpoint of step 3; goes on to step 4 and is stopped.
    watch.change[8 + 5] = spoiled
    with pytest.raises(TrainingError, match="step 5"):
        run(adapted, parts)
    assert saved_steps(tmp_path / "parts") == [3]
    again = dataclasses.replace(parts, resume_from_checkpoint="latest")
    died = len(watch.order("queue"))
    watch.at[died + 1] = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        run(adapted, again)
    assert (stopped.value.step, stopped.value.status) == (4, 128 + signal.SIGINT)
    assert read_log(tmp_path / "parts" / "trainer_log.jsonl")[-1]["step"] == 4, "what was queued is read and logged"
    resumed = run(adapted, again)
    for one, other in zip(adapters(expected), adapters(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert comparable(tmp_path / "whole" / "trainer_log.jsonl") == comparable(tmp_path / "parts" / "trainer_log.jsonl")


def test_tokens_per_second_are_of_results_not_of_queued_steps(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of its own, by which the results of a step are there 0.25 s after those of the step before."""
    seconds, now, read = 0.25, 0.0, Results._read

    def timed(self: Results, one: Any) -> None:
        nonlocal now
        now = seconds * one.step
        read(self, one)

    monkeypatch.setattr(Results, "_read", timed)
    monkeypatch.setattr(results, "time", SimpleNamespace(perf_counter=lambda: now))
    # A look restarts the clock with nothing queued: there, counting queued steps would count the next one as done.
    config = settings(tiny_gptq, rows, tmp_path / "out", eval_steps=2)
    run(adapted, config, evaluate=lambda model, title: {"loss": 1.0})
    tokens = [int((batch["segment_ids"] > 0).sum()) for batch in islice(data_of(config).train, 8)]
    rates = [one["tokens_per_second"] for one in read_log(tmp_path / "out" / "trainer_log.jsonl") if "loss" in one]
    assert rates == [None, *(pytest.approx(count / seconds, abs=0.1) for count in tokens[1:])]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_feed_gives_every_batch_with_the_place_behind_it(
    tiny_gptq: Path, rows: Path, tmp_path: Path, depth: int
) -> None:
    config = settings(tiny_gptq, rows, tmp_path / "out")
    stream, plain = data_of(config).train, data_of(config).train
    feed = Feed(stream, 5, depth=depth)
    for _ in range(5):
        batch, place = feed.take()
        feed.fill()
        expected = next(plain)
        assert batch.keys() == expected.keys()
        for key, array in batch.items():
            assert isinstance(array, jax.Array)
            np.testing.assert_array_equal(array, expected[key])
        assert place == plain.state()
    assert stream.state() == plain.state(), "no more than asked for is taken from the stream"
    with pytest.raises(IndexError):
        feed.take()
