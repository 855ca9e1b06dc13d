"""The training loop: steps, log lines, evaluations, checkpoints, and an orderly stop."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from lotaqaf_jax.data import TrainingData
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, Recompute, count_moves, linears, with_omegas
from lotaqaf_jax.parallel import put_rows, whole
from lotaqaf_jax.parallel.processes import is_main
from lotaqaf_jax.training.checkpoints import RunCheckpoints, saved_steps
from lotaqaf_jax.training.compilation import CompiledStep, least_recompute
from lotaqaf_jax.training.config import TrainConfig
from lotaqaf_jax.training.feed import Feed
from lotaqaf_jax.training.log import RunLog
from lotaqaf_jax.training.methods import method_of
from lotaqaf_jax.training.results import Results
from lotaqaf_jax.training.signals import StopSignal
from lotaqaf_jax.training.step import TrainState, make_train_step, split_model

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

    A run that was stopped or killed and resumed gives the same adapters and, but for its times, the same log as one
    that was not: the checkpoint holds adapters, optimizer state and the place in the data, and everything else follows
    from the seed. A line is in the log before a later checkpoint is begun, and lines behind a checkpoint are cut off
    when a run goes on from it, so that none is missing and none there twice.

    Args:
        model: a decoder with fresh adapters, of the method that ``config`` names.
        data: its training stream is used from where it stands.
        config: settings of the run.
        evaluate: (model, title) -> numbers on held-out rows, logged as ``eval_<name>`` before the first step, after
            the last, and every ``config.eval_steps``; None for no evaluation.

    Returns:
        The model with trained adapters.

    Raises:
        TrainingError: a loss or gradient is NaN or infinite; names step and tensor.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written.
        ConfigError: the checkpoint to resume from is missing, or of a run with other settings; or there are
            checkpoints, and they are not resumed from.
        CheckpointError: a checkpoint cannot be written or read.
    """
    config = config.settled(data.report.format, _main_width(model))
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    total = config.max_steps if config.max_steps > 0 else data.num_steps(config.num_train_epochs)
    method = method_of(config)
    optimizer = method.optimizer(config, total)
    rates, share = method.rates(config, total), method.share(config, total)
    graph, adapters, frozen = split_model(model)
    # Copied, because the step donates its state and the caller's model must stay whole.
    adapters = jax.tree.map(jnp.copy, adapters)
    state = TrainState(adapters, optimizer.init(adapters), jnp.int32(0))
    if model.sharding is not None:
        state = whole(state, model.sharding.mesh)
    put = functools.partial(put_rows, model)
    checkpoints = RunCheckpoints(output / "checkpoints", keep=config.save_total_limit)
    resumed: int | None = None
    if config.resume_from_checkpoint:
        resumed = checkpoints.find(config.resume_from_checkpoint)
    elif saved_steps(checkpoints.directory):
        raise ConfigError(
            f"{checkpoints.directory}: holds checkpoints of an earlier run. Go on from them, with "
            "--resume_from_checkpoint, or name another --output_dir."
        )
    if resumed is not None:
        state, place = checkpoints.load(resumed, state)
        _same_settings(config, total, place)
        data.train.restore(place["data"])
        checkpoints.begin_after(resumed)
        if is_main():
            print(f"resumed from step {resumed} of {total}{_other_layout(config, place)}")

    first = int(state.step)

    def current() -> Decoder:
        model = nnx.merge(graph, state.adapters, frozen, copy=True)
        return model if share is None else with_omegas(model, share(state.step))

    def done(step: int, record: dict[str, Any] | None) -> None:
        bar.update()
        if record is not None:
            rate = {} if rates is None else {"learning_rate": float(f"{float(rates(step - 1)):.6g}")}
            log.write(step, record | rate | {"epoch": step / data.train.steps_per_epoch})
            shown = {"loss": f"{record['loss']:.4f}"}
            if "moved" in record:
                shown["moved"] = f"{100 * record['moved']:.3f}%"
            bar.set_postfix(shown, refresh=False)

    def look(step: int) -> None:
        if evaluate is not None:
            numbers = evaluate(current(), f"held-out rows at step {step}")
            log.write(step, {f"eval_{name}": value for name, value in numbers.items()})

    with checkpoints:
        log = RunLog(output / "trainer_log.jsonl", report_to=config.report_to, resume_step=resumed)
        bar = tqdm(total=total, initial=first, desc="training", unit="step", dynamic_ncols=True, disable=not is_main())
        results = Results(model, done)
        with StopSignal() as stop, log, bar:
            if first < total:
                make = functools.partial(make_train_step, graph, optimizer, share=share, placed=state)
                compiled = _compile(make, config, (state, frozen, put(data.train.peek(0))))
            if first == 0:
                look(0)
            feed = Feed(data.train, total - first, put)
            for step in range(first + 1, total + 1):
                batch, place = feed.take()
                state, metrics = compiled(state, frozen, batch)
                # Queued now, since the next step is given this state's memory.
                logged = step % config.logging_steps == 0 or step in (1, total)
                results.add(step, metrics, count_moves(current()) if logged else None)
                feed.fill()
                # The step before is read while this one runs. A NaN is thus found one step late, so whatever looks at
                # the state, or keeps it, first reads all that is queued.
                results.read(leave=1)
                if step == total or (config.eval_steps and step % config.eval_steps == 0):
                    results.read()
                    look(step)
                    results.clock.restart()
                stopping = stop.by_all(step) and step < total
                if stopping or (config.save_steps and step % config.save_steps == 0):
                    results.read()
                    # The place behind this step's batch; the stream itself is further on.
                    kept = {
                        "data": place,
                        "settings": config.decisive(),
                        "layout": config.layout(),
                        "total_steps": total,
                    }
                    checkpoints.save(state, kept, wait=stopping)
                if stopping:
                    raise Stopped(step, stop.status)
    return current()


def _main_width(model: Decoder) -> int:
    """Bits of most of the packed integers; 16 where there are none."""
    integers: Counter[int] = Counter()
    for names, linear in linears(model):
        if linear.is_quantized:
            integers[linear.packed.bits] += len(names) * math.prod(linear.packed.shape)
    return max(integers, key=integers.__getitem__, default=16)


def _compile(make: Callable[..., Any], config: TrainConfig, arguments: tuple[Any, Any, Any]) -> CompiledStep:
    """The step, compiled for ``arguments``, with the least recomputing that fits if the settings leave it open."""

    def compiled(way: Recompute) -> CompiledStep:
        jitted = make(accumulate=config.accumulation, recompute=way, packed=config.packing)
        return CompiledStep(jitted, *arguments)

    started = time.perf_counter()
    way: Recompute
    if not config.gradient_checkpointing:
        way, step = "none", compiled("none")
    elif config.recompute == "auto":
        way, step = least_recompute(compiled)
    else:
        way, step = config.recompute, compiled(config.recompute)
    if is_main():
        tqdm.write(
            f"compiled the step in {time.perf_counter() - started:.1f} s; recomputing in the backward pass: {way}"
        )
    return step


def _other_layout(config: TrainConfig, place: dict[str, Any]) -> str:
    """What to say where the run goes on with its rows spread otherwise over devices or time."""
    then, now = place.get("layout", config.layout()), config.layout()
    other = [f"{key} {then[key]} then, {now[key]} now" for key in now if then.get(key) != now[key]]
    if not other:
        return ""
    return (
        f"; {', '.join(other)}: the rows are the same, sums are rounded in another order, and losses agree to rounding"
    )


def _same_settings(config: TrainConfig, total: int, place: dict[str, Any]) -> None:
    # Steps in all may have been given as epochs before and as steps now; only what they come to matters.
    other = config.differences(place["settings"], ignore=("max_steps", "num_train_epochs"))
    if place["total_steps"] != total:
        other.append(f"total_steps: {place['total_steps']} then, {total} now")
    if other:
        raise ConfigError(
            f"--resume_from_checkpoint: the run was started with other settings ({', '.join(other)}). Use the same, or "
            "another --output_dir."
        )
