"""The baselines in the trainer: LoRA trains as PEFT's does, and every promise of the loop holds for all methods."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lotaqaf_jax.errors import TrainingError
from lotaqaf_jax.models import Adapter, Decoder, QuantSpec, adapted_linears, add_lora, add_qalora, load_pretrained
from lotaqaf_jax.training import METHODS, Stopped, TrainConfig, TrainState, make_train_step, method_of, summary
from lotaqaf_jax.training.adamw import adamw, learning_rates
from lotaqaf_jax.training.log import plot_log, read_log
from lotaqaf_jax.training.step import nonfinite_tensors, split_model
from tests.models.tiny import CONFIG, quantized_decoder, set_random_low_rank
from tests.peer import lora_tensors, peft_model
from tests.training.test_loop import adapters, comparable, run
from tests.training.test_loss import batch_of

STEPS = 4


def settings(method: str, folder: Path, rows: Path, output: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "method": method,
        "model": str(folder),
        "dataset": str(rows),
        "output_dir": str(output),
        "max_seq_length": 32,
        "per_device_train_batch_size": 4,
        "lora_r": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.2,
        "max_steps": 12,
        "target_modules": ["q_proj", "down_proj"],
    }
    return TrainConfig(**{**given, **changes})


def test_lora_trains_as_pefts() -> None:
    """Losses, gradient norms and adapters of a few steps: torch, PEFT, its AdamW and clipping, in float32."""
    import torch

    config = dataclasses.replace(CONFIG, num_hidden_layers=2, vocab_size=320)
    model = add_lora(quantized_decoder(config, QuantSpec(4, 16, act_order=True)), rank=4, alpha=6.0)
    set_random_low_rank(model)
    peer = peft_model(model)
    rates = learning_rates(5e-3, STEPS, scheduler="linear")
    optimizer = adamw(rates, max_grad_norm=0.3, weight_decay=0.01)
    graph, state, frozen = split_model(model)
    state = TrainState(jax.tree.map(jnp.copy, state), optimizer.init(state), jnp.int32(0))
    step = make_train_step(graph, optimizer, accumulate=2)
    parameters = [p for p in peer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == sum(leaf.size for leaf in jax.tree.leaves(state.adapters))
    theirs = torch.optim.AdamW(parameters, weight_decay=0.01)
    rng = np.random.default_rng(1)
    for n in range(STEPS):
        batch = batch_of(rng, rows=4)
        state, metrics = step(state, frozen, batch)
        ids, labels = (torch.tensor(np.asarray(batch[key])).long() for key in ("input_ids", "labels"))
        logits = peer(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 320), labels[:, 1:].reshape(-1))
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        theirs.param_groups[0]["lr"] = float(rates(n))
        theirs.step()
        assert metrics.changed is None
        np.testing.assert_allclose(metrics.loss, loss.item(), rtol=2e-5)
        np.testing.assert_allclose(metrics.grad_norm, norm.item(), rtol=2e-4)
        assert norm > 0.3, "the steps are to be clipped"
    ours = lora_tensors(nnx.merge(graph, state.adapters, frozen))
    before = lora_tensors(model)
    for name, (part, array) in ours.items():
        layer = peer.get_submodule(f"base_model.model.{name.rpartition('.')[0]}")
        expected = getattr(layer, part)["default"].weight.detach().numpy()
        moved = np.abs(expected - before[name][1]).max()
        assert moved > 5e-3
        # Adam divides by the size of a gradient, so that one near 0 moves by its rounding.
        assert np.quantile(np.abs(array - expected), 0.99) < 0.01 * moved, name


@pytest.mark.parametrize("method", ["lora", "qalora"])
def test_loss_falls_and_the_log_says_what_there_is(method: str, tiny_gptq: Path, rows: Path, tmp_path: Path) -> None:
    config = settings(method, tiny_gptq, rows, tmp_path / "out")
    model = method_of(config).adapt(load_pretrained(tiny_gptq, progress=False), config)
    before = adapters(model)
    trained = run(model, config)
    records = read_log(tmp_path / "out" / "trainer_log.jsonl")
    losses = [record["loss"] for record in records]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    last = records[-1]
    assert "changed" not in last
    assert ("moved" in last, "mean_abs_mu" in last) == ((True, True) if method == "qalora" else (False, False))
    if method == "qalora":
        assert last["moved"] == 0
        assert last["mean_abs_mu"] > 0
    rates = [record["learning_rate"] for record in records]
    np.testing.assert_allclose(rates[:4], [0, 1e-2 / 3, 2e-2 / 3, 1e-2], rtol=1e-5)
    assert rates[-1] == pytest.approx(1e-2 / 9)
    for old, new, untouched in zip(before, adapters(trained), adapters(model), strict=True):
        assert new.dtype == np.float32
        assert not np.array_equal(old, new)
        np.testing.assert_array_equal(old, untouched)
    plot_log(tmp_path / "out" / "trainer_log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["lora", "qalora"])
def test_stopped_and_resumed_is_the_same_as_never_stopped(
    method: str, tiny_gptq: Path, rows: Path, tmp_path: Path
) -> None:
    def start(output: str, **changes: Any) -> tuple[Decoder, TrainConfig]:
        config = settings(method, tiny_gptq, rows, tmp_path / output, eval_steps=3, **changes)
        return method_of(config).adapt(load_pretrained(tiny_gptq, progress=False), config), config

    expected = run(*start("whole"), evaluate=lambda model, title: {"loss": 1.0})

    def stop_at_step_3(model: Decoder, title: str) -> dict[str, float]:
        if title.endswith("step 3"):
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    with pytest.raises(Stopped):
        run(*start("parts"), evaluate=stop_at_step_3)
    again = start("parts", resume_from_checkpoint="latest")
    resumed = run(*again, evaluate=lambda model, title: {"loss": 1.0})
    for one, other in zip(adapters(expected), adapters(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert comparable(tmp_path / "whole" / "trainer_log.jsonl") == comparable(tmp_path / "parts" / "trainer_log.jsonl")


@pytest.mark.parametrize("method", ["lora", "qalora"])
def test_a_nan_is_traced_to_its_tensor(method: str) -> None:
    model = (add_lora if method == "lora" else add_qalora)(quantized_decoder(), rank=2)
    _, state, _ = split_model(model)
    squares = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[:1]), state)
    poisoned = squares["segments"][0]["mlp"]["up_proj"]["adapter"]
    value = poisoned.get_value()
    poisoned.set_value(dataclasses.replace(value, a=value.a.at[1].set(jnp.inf)))
    assert list(nonfinite_tensors(model, squares)) == [f"model.layers.1.mlp.up_proj.{method}_A"]


def test_a_rate_that_diverges_stops_the_run(tiny_gptq: Path, rows: Path, tmp_path: Path) -> None:
    config = settings("qalora", tiny_gptq, rows, tmp_path / "out", learning_rate=1e38, warmup_ratio=0.0)
    model = method_of(config).adapt(load_pretrained(tiny_gptq, progress=False), config)
    with pytest.raises(TrainingError, match=r"step \d: loss"):
        run(model, config)


def test_every_method_says_what_it_is(tiny_gptq: Path, rows: Path, tmp_path: Path) -> None:
    for method in METHODS:
        given = {"omega": 2.0} if method == "lota" else {"lora_alpha": 3.0, "learning_rate": 1e-4, "max_grad_norm": 0.5}
        config = TrainConfig(method=method, model=str(tiny_gptq), dataset=str(rows), lora_r=8, **given)
        said = summary(config, 7)
        assert "rank 8" in said
        assert "7 steps of 8 rows" in said
        for words in ("omega 2",) if method == "lota" else ("alpha 3", "learning rate 0.0001 constant", "up to 0.5"):
            assert words in said


def test_adapters_are_all_that_is_trained(tiny_gptq: Path) -> None:
    model = add_lora(load_pretrained(tiny_gptq, progress=False), rank=4)
    _, state, _ = split_model(model)
    pairs = [leaf for _, _, pair in adapted_linears(model) for leaf in (pair.a, pair.b)]
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(leaf.size for leaf in pairs)
    assert len(jax.tree.leaves(nnx.state(model, Adapter))) == len(pairs)
