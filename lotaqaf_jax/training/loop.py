"""The training loop: steps, log lines, evaluations, checkpoints, and an orderly stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from lotaqaf_jax.data import TrainingData
from lotaqaf_jax.errors import ConfigError, TrainingError
from lotaqaf_jax.models import Decoder, Recompute, adapter_statistics
from lotaqaf_jax.optim import t_signsgd
from lotaqaf_jax.training.checkpoints import RunCheckpoints
from lotaqaf_jax.training.compilation import least_recompute
from lotaqaf_jax.training.config import TrainConfig
from lotaqaf_jax.training.log import RunLog
from lotaqaf_jax.training.signals import StopSignal
from lotaqaf_jax.training.step import (
    Metrics,
    TrainState,
    make_train_step,
    nonfinite_tensors,
    split_model,
)

__all__ = ["Stopped", "train"]


class Stopped(Exception):  # noqa: N818  (not an error)
    """A signal stopped the run after ``step``, and a checkpoint was written; leave with exit status ``status``."""

    def __init__(self, step: int, status: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.status = status


def train(
    model: Decoder,
    data: TrainingData,
    config: TrainConfig,
    *,
    evaluate: Callable[[Decoder, str], dict[str, float]] | None = None,
) -> Decoder:
    """Train the adapters of ``model``.

    A run that was stopped and resumed gives the same adapters and the same logged losses as one that was not: the
    checkpoint holds adapters, optimizer state and the place in the data, and everything else follows from the seed.

    Args:
        model: a decoder with fresh adapters.
        data: its training stream is used from where it stands.
        config: settings of the run.
        evaluate: (model, title) -> numbers on held-out rows, logged as ``eval_<name>`` before the first step, after
            the last, and every ``config.eval_steps``; None for no evaluation.

    Returns:
        The model with trained adapters.

    Raises:
        TrainingError: a loss or gradient is NaN or infinite; names step and tensor.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written.
        ConfigError: the checkpoint to resume from is missing, or of a run with other settings.
    """
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    total = config.max_steps if config.max_steps > 0 else data.num_steps(config.num_train_epochs)
    optimizer = t_signsgd(total, config.sigma_schedule, beta=config.beta or None, stacked_axes=1)
    graph, adapters, frozen = split_model(model)
    # Copied, because the step donates its state and the caller's model must stay whole.
    adapters = jax.tree.map(jnp.copy, adapters)
    state = TrainState(adapters, optimizer.init(adapters), jnp.int32(0))
    checkpoints = RunCheckpoints(output / "checkpoints", keep=config.save_total_limit)
    resumed: int | None = None
    if config.resume_from_checkpoint:
        resumed = checkpoints.find(config.resume_from_checkpoint)
        state, place = checkpoints.load(resumed, state)
        _same_settings(config, total, place)
        data.train.restore(place["data"])
        print(f"resumed from step {resumed} of {total}")

    def step_of(recompute: Recompute) -> Any:
        return make_train_step(
            graph, optimizer, accumulate=config.accumulation, recompute=recompute, packed=config.packing
        )

    recompute: Recompute = "none"
    if config.gradient_checkpointing:
        recompute = (
            config.recompute
            if config.recompute != "auto"
            else least_recompute(lambda way: step_of(way).lower(state, frozen, data.train.peek(0)).compile())
        )
    step_function = step_of(recompute)
    if jax.default_backend() == "gpu":
        print(f"recomputing in the backward pass: {recompute}")

    def current(state: TrainState) -> Decoder:
        return nnx.merge(graph, state.adapters, frozen, copy=True)

    def save(state: TrainState, *, wait: bool = False) -> None:
        place = {"data": data.train.state(), "settings": config.decisive(), "total_steps": total}
        checkpoints.save(state, place, wait=wait)

    def look(step: int, state: TrainState) -> None:
        if evaluate is not None:
            numbers = evaluate(current(state), f"held-out rows at step {step}")
            log.write(step, {f"eval_{name}": value for name, value in numbers.items()})

    first = int(state.step)
    log = RunLog(output / "trainer_log.jsonl", report_to=config.report_to, resume_step=resumed)
    bar = tqdm(total=total, initial=first, desc="training", unit="step", dynamic_ncols=True)
    clock = _Clock()
    try:
        with StopSignal() as stop, log, bar:
            if first == 0:
                look(0, state)
            for step in range(first + 1, total + 1):
                batch = {key: jnp.asarray(value) for key, value in next(data.train).items()}
                state, metrics = step_function(state, frozen, batch)
                bar.update()
                # The loss is read here, so a NaN is found in the step that made it, before anything is saved.
                record = _record(metrics)
                if record is None:
                    raise TrainingError(_blame(step, metrics, current(state)))
                clock.add(int(metrics.tokens))
                if step % config.logging_steps == 0 or step in (1, total):
                    record |= _adapters(current(state)) | {"tokens_per_second": clock.rate()}
                    record["epoch"] = step / data.train.steps_per_epoch
                    log.write(step, record)
                    moved = f"{100 * record['moved']:.3f}%"
                    bar.set_postfix(loss=f"{record['loss']:.4f}", moved=moved, refresh=False)
                if step == total or (config.eval_steps and step % config.eval_steps == 0):
                    look(step, state)
                    clock.restart()
                stopping = stop.received is not None and step < total
                if stopping or (config.save_steps and step % config.save_steps == 0):
                    save(state, wait=stopping)
                if stopping and stop.received is not None:
                    raise Stopped(step, 128 + int(stop.received))
    finally:
        checkpoints.close()
    return current(state)


class _Clock:
    """Tokens per second since the last question, without the step that compiles."""

    def __init__(self) -> None:
        self._tokens = 0
        self._start: float | None = None
        self._rate = math.nan

    def add(self, tokens: int) -> None:
        if self._start is None:
            self.restart()
        else:
            self._tokens += tokens

    def restart(self) -> None:
        self._tokens, self._start = 0, time.perf_counter()

    def rate(self) -> float | None:
        """Tokens per second; None while there is nothing to tell."""
        if self._start is not None and self._tokens:
            self._rate = self._tokens / (time.perf_counter() - self._start)
            self.restart()
        return None if math.isnan(self._rate) else round(self._rate, 1)


def _record(metrics: Metrics) -> dict[str, Any] | None:
    """The numbers of a step, or None if one of them is NaN or infinite."""
    loss, norm = float(metrics.loss), float(metrics.grad_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return None
    return {"loss": loss, "grad_norm": norm, "changed": int(metrics.changed)}


def _adapters(model: Decoder) -> dict[str, float]:
    """Share of integer weights that the adapters move, and mean |mu| in steps of the grid, over all adapted layers."""
    every = adapter_statistics(model).values()
    moved, integers = sum(one.moved for one in every), sum(one.integers for one in every)
    return {"moved": moved / integers, "mean_abs_mu": sum(one.mu for one in every) / sum(one.offsets for one in every)}


def _blame(step: int, metrics: Metrics, model: Decoder) -> str:
    names = list(nonfinite_tensors(model, metrics.squares))
    where = f"The gradient of {names[0]} and {len(names) - 1} more is not finite." if names else "No gradient is NaN."
    return (
        f"step {step}: loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}. {where} "
        "Nothing of this step was saved; look at the rows of this batch, or go on from an earlier "
        "checkpoint with another --seed or with --dtype float32."
    )


def _same_settings(config: TrainConfig, total: int, place: dict[str, Any]) -> None:
    now, then = {**config.decisive(), "total_steps": total}, {**place["settings"], "total_steps": place["total_steps"]}
    # Steps in all may have been given as epochs before and as steps now; only what they come to matters.
    ignored = {"max_steps", "num_train_epochs"}
    other = [key for key in now if key not in ignored and now[key] != then.get(key)]
    if other:
        what = ", ".join(f"{key}: {then.get(key)!r} then, {now[key]!r} now" for key in other)
        raise ConfigError(f"--resume_from_checkpoint: the run was started with other settings ({what}). Use the same.")
