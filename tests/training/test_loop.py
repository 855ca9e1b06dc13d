"""The loop: a falling loss, exact resume, an orderly stop, and a NaN that stops the run by name."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lotaqaf_jax.data import TrainingData, load_data
from lotaqaf_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from lotaqaf_jax.models import Adapter, Decoder, adapted_linears, adapter_statistics, add_adapters, load_pretrained
from lotaqaf_jax.models.pretrained import load_tokenizer
from lotaqaf_jax.thresholds import omega_of_share
from lotaqaf_jax.training import Stopped, TrainConfig, train
from lotaqaf_jax.training.checkpoints import RunCheckpoints, saved_steps
from lotaqaf_jax.training.log import plot_log, read_log

LEFT_OUT: Any = object()
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
RECOMMENDED = {"recipe": "recommended", "omega": LEFT_OUT, "sigma_schedule": LEFT_OUT, "moved": 0.1}


def settings(folder: Path, rows: Path, output: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "model": str(folder),
        "dataset": str(rows),
        "output_dir": str(output),
        "max_seq_length": 32,
        "per_device_train_batch_size": 4,
        "lora_r": 8,
        "omega": 2.0,
        "max_steps": 8,  # part of the compiled step
        "sigma_schedule": "paper",
        "recipe": "published",
    }
    given = {k: v for k, v in given.items() if changes.get(k, v) is not LEFT_OUT}
    changes = {k: v for k, v in changes.items() if v is not LEFT_OUT}
    return TrainConfig(**{**given, **changes})


def data_of(config: TrainConfig) -> TrainingData:
    return load_data(config.data(), load_tokenizer(str(config.model)), config.train_batch_size, progress=False)


def run(model: Decoder, config: TrainConfig, **more: Any) -> Decoder:
    return train(model, data_of(config), config, **more)


def adapters(model: Decoder) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, Adapter))]


def comparable(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in read_log(path)]


@pytest.mark.parametrize("changes", [{}, {"beta": 0.9}, RECOMMENDED], ids=["plain", "beta", "recommended"])
def test_loss_falls_and_the_log_says_so(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(tiny_gptq, rows, tmp_path / "out", max_steps=20, **changes)
    before = adapters(adapted)
    trained = run(adapted, config)
    records = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert [record["step"] for record in records] == list(range(1, 21))
    for key in ("loss", "grad_norm", "changed", "moved", "mean_abs_mu", "tokens_per_second", "epoch"):
        assert key in records[-1]
    losses = [record["loss"] for record in records]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    assert records[5]["changed"] > 0
    assert any((old != new).any() for old, new in zip(before, adapters(trained), strict=True))
    for old, untouched in zip(before, adapters(adapted), strict=True):
        np.testing.assert_array_equal(old, untouched)
    plot_log(tmp_path / "out" / "trainer_log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_thresholds_follow_the_adapters_until_the_end(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path
) -> None:
    """Evaluation, export and the last line of the log see the omegas of the wanted share of the final A @ B."""
    trained = run(adapted, settings(tiny_gptq, rows, tmp_path / "out", max_steps=12, **RECOMMENDED))
    for _, _, adapter in adapted_linears(trained):
        np.testing.assert_array_equal(adapter.omega, omega_of_share(adapter.a, adapter.b, 0.1))
    shares = [one.moved / one.integers for one in adapter_statistics(trained).values()]
    assert 0.01 < np.mean(shares) <= max(shares) <= 0.1
    moved = sum(one.moved for one in adapter_statistics(trained).values())
    integers = sum(one.integers for one in adapter_statistics(trained).values())
    assert read_log(tmp_path / "out" / "trainer_log.jsonl")[-1]["moved"] == pytest.approx(moved / integers, rel=1e-4)


def test_the_share_left_out_goes_by_the_width_of_the_model(tiny_gptq: Path, tmp_path: Path) -> None:
    """At 3 bit 2 % of the entries of A @ B may pass, on plain text; the config alone does not know the width."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one after another comes"}\n' * 24, encoding="utf-8")
    model = load_pretrained(CHECKPOINTS / "ckpt-llamapos-b3g32-asym", progress=False)
    model = add_adapters(model, 8, 2, target_modules=("q_proj",))
    changes = {**RECOMMENDED, "moved": LEFT_OUT, "max_steps": 3, "learning_rate": 0.9}
    config = settings(tiny_gptq, text, tmp_path / "out", **changes)  # the tokenizer's folder
    assert config.share == 0.04
    for _, _, adapter in adapted_linears(run(model, config)):
        np.testing.assert_array_equal(adapter.omega, omega_of_share(adapter.a, adapter.b, 0.02))
        assert (adapter.omega != omega_of_share(adapter.a, adapter.b, 0.04)).any()


@pytest.mark.parametrize(
    "settings_of",
    [{"packing": False}, {"packing": True, "beta": 0.9}, RECOMMENDED],
    ids=["plain", "beta", "recommended"],
)
def test_stopped_and_resumed_is_the_same_as_never_stopped(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path, settings_of: dict[str, Any]
) -> None:
    changes = {**settings_of, "eval_steps": 3}
    whole = settings(tiny_gptq, rows, tmp_path / "whole", **changes)
    expected = run(adapted, whole, evaluate=lambda model, title: {"loss": 1.0})

    def stop_at_step_3(model: Decoder, title: str) -> dict[str, float]:
        if title.endswith("step 3"):
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    parts = settings(tiny_gptq, rows, tmp_path / "parts", **changes)
    with pytest.raises(Stopped) as stopped:
        run(adapted, parts, evaluate=stop_at_step_3)
    assert (stopped.value.step, stopped.value.status) == (3, 128 + signal.SIGTERM)
    again = dataclasses.replace(parts, resume_from_checkpoint="latest")
    resumed = run(adapted, again, evaluate=lambda model, title: {"loss": 1.0})

    for one, other in zip(adapters(expected), adapters(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert comparable(tmp_path / "whole" / "trainer_log.jsonl") == comparable(tmp_path / "parts" / "trainer_log.jsonl")


def test_checkpoints_are_kept_up_to_the_limit(adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path) -> None:
    config = settings(tiny_gptq, rows, tmp_path / "out", save_steps=2, save_total_limit=2)
    run(adapted, config)
    steps = sorted(int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir() if path.name.isdecimal())
    assert steps == [6, 8]
    with pytest.raises(ConfigError, match="steps 6, 8"):
        run(adapted, dataclasses.replace(config, resume_from_checkpoint="3"))
    path = str(tmp_path / "out" / "checkpoints" / "6")
    run(adapted, dataclasses.replace(config, resume_from_checkpoint=path))


def test_going_back_leaves_no_checkpoint_ahead_of_the_log(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path
) -> None:
    """Back to step 2, stopped at once, and on from the latest, which is that of step 2 and none of the first run."""
    config = settings(tiny_gptq, rows, tmp_path / "out", save_steps=2, save_total_limit=9, eval_steps=3)
    run(adapted, config, evaluate=lambda model, title: {"loss": 1.0})
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        run(adapted, config)
    expected = comparable(tmp_path / "out" / "trainer_log.jsonl")

    def stop(model: Decoder, title: str) -> dict[str, float]:
        raise KeyboardInterrupt

    back = dataclasses.replace(config, resume_from_checkpoint=str(tmp_path / "out" / "checkpoints" / "2"))
    with pytest.raises(KeyboardInterrupt):
        run(adapted, back, evaluate=stop)
    again = dataclasses.replace(config, resume_from_checkpoint="latest")
    run(adapted, again, evaluate=lambda model, title: {"loss": 1.0})
    assert comparable(tmp_path / "out" / "trainer_log.jsonl") == expected
    assert saved_steps(tmp_path / "out" / "checkpoints") == [2, 4, 6, 8]


def test_checkpoints_whose_removal_was_cut_off_are_in_nobodys_way(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path
) -> None:
    """Killed while the oldest checkpoint was being removed: some, or all, of its files are gone, in whatever order."""
    config = settings(tiny_gptq, rows, tmp_path / "out", save_steps=2, save_total_limit=9)
    run(adapted, config)
    folder = tmp_path / "out" / "checkpoints"
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        (folder / "2" / name).unlink()
    shutil.rmtree(folder / "4")
    (folder / "4").mkdir()
    expected = (tmp_path / "out" / "trainer_log.jsonl").read_text()
    again = dataclasses.replace(config, resume_from_checkpoint="auto", save_total_limit=2)
    run(adapted, again)
    assert saved_steps(folder) == [6, 8]
    assert (tmp_path / "out" / "trainer_log.jsonl").read_text() == expected


def test_auto_begins_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    with RunCheckpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.find("auto") is None
        with pytest.raises(ConfigError, match="it holds no checkpoint"):
            checkpoints.find("latest")


def test_resuming_with_other_settings_is_refused(adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path) -> None:
    config = settings(tiny_gptq, rows, tmp_path / "out", save_steps=8)
    run(adapted, config)
    again = dataclasses.replace(config, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match=r"omega: 2.0 then, 3.0 now"):
        run(adapted, dataclasses.replace(again, omega=3.0))
    rows.write_text(rows.read_text().replace("after 3", "after 4"))
    with pytest.raises(DataError, match="data"):
        run(adapted, again)


def test_nan_stops_with_step_and_tensor(adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path) -> None:
    norm = adapted.norm.weight
    norm.set_value(norm.get_value().at[0].set(jnp.nan))
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*model\.layers\.0\.self_attn\.q_proj\.lota_[AB]"):
        run(adapted, settings(tiny_gptq, rows, tmp_path / "out"))


def test_full_disk_is_told_in_a_sentence(
    adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = settings(tiny_gptq, rows, tmp_path / "out", save_steps=1)
    checkpoints = RunCheckpoints(tmp_path / "out" / "checkpoints")
    monkeypatch.setattr(type(checkpoints._orbax), "save_async", full)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 1 could not be written .*No space left"):
        run(adapted, config)


def test_log_survives_a_cut_off_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]


def test_tensorboard_gets_the_numbers(adapted: Decoder, tiny_gptq: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run(adapted, settings(tiny_gptq, rows, tmp_path / "out", report_to="tensorboard"))
    assert any((tmp_path / "out" / "runs").iterdir())
