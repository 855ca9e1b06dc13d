"""What train.py says of memory and time before it loads, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import train
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import preset
from lotaqaf_jax.plan import about_run, check_fits, gpu, memory_of, shape_of
from lotaqaf_jax.plan.check import MARGIN, settings_of
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.training import TrainConfig
from tests.test_train import flags
from tests.training.conftest import tiny_gptq, write_rows

__all__ = ["tiny_gptq"]  # a fixture

GIB = 2**30
QWEN = shape_of(preset("qwen2.5-14b"), 4, 64)


def config(**changes: Any) -> TrainConfig:
    given: dict[str, Any] = {"model": "m", "dataset": "d", "dtype": "bfloat16", "max_seq_length": 1024, **changes}
    return TrainConfig(**given)


@pytest.fixture(autouse=True)
def _fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")


def test_settings_are_the_runs() -> None:
    run = config(lora_r=16, packing=True, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    found = settings_of(run, length=640)
    assert (found.batch, found.length, found.accumulate, found.rank, found.packing) == (4, 640, 2, 16, True)
    assert (found.recompute, found.optimizer, found.itemsize, found.float8) == ("block", "ternary_adam", 2, False)
    assert settings_of(config(gradient_checkpointing=False)).recompute == "none"
    assert settings_of(config(recompute="products")).recompute == "products"
    assert settings_of(config(method="lora")).optimizer == "adamw"
    assert settings_of(config(optimizer="t_signsgd", beta=0.9)).beta
    assert settings_of(config(dtype="float32")).itemsize == 4


def test_two_lines_where_all_is_well() -> None:
    memory, time = check_fits(config(), QWEN, 100 * GIB, gpu=gpu("h200"))
    needed = memory_of(QWEN, settings_of(config())).needed / GIB
    assert memory.startswith(f"memory       about {needed:.3g} of 100 GiB with --recompute block: weights ")
    assert "; with products " in memory
    assert re.fullmatch(r"time         about [\d.]+ s a step, [\d,]+ tokens/s", time)
    assert "not measured" in check_fits(config(), QWEN, 100 * GIB, gpu=gpu("h100"))[1]
    assert len(check_fits(config(), QWEN, 100 * GIB)) == 1  # an unknown card


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    run = config(per_device_train_batch_size=64)
    with pytest.raises(ConfigError, match=r"--model: a step needs about .* GiB of memory with 64 rows") as refused:
        check_fits(run, QWEN, 40 * GIB)
    suggested = re.search(
        r"--per_device_train_batch_size (\d+) --gradient_accumulation_steps (\d+)", str(refused.value)
    )
    assert suggested is not None
    batch, accumulate = map(int, suggested.groups())
    assert batch * accumulate == 64
    lines = check_fits(
        dataclasses.replace(run, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate),
        QWEN,
        40 * GIB,
    )
    assert len(lines) == 1


def test_a_run_near_the_limit_is_warned_and_not_refused() -> None:
    needed = memory_of(QWEN, settings_of(config())).needed
    near = check_fits(config(), QWEN, needed / MARGIN * 1.001)
    assert near[-1].startswith("             this may not fit; to be safe: --per_device_train_batch_size ")
    with pytest.raises(ConfigError):
        check_fits(config(), QWEN, needed / MARGIN * 0.999)


def test_a_way_of_recomputing_that_was_asked_for_is_what_is_checked() -> None:
    with pytest.raises(ConfigError, match="--recompute block would take"):
        check_fits(config(recompute="products"), QWEN, 30 * GIB)
    with pytest.raises(ConfigError, match="--gradient_checkpointing true --recompute products would take"):
        check_fits(config(gradient_checkpointing=False), QWEN, 70 * GIB)
    assert check_fits(config(), QWEN, 30 * GIB)


def test_a_larger_share_of_the_card_is_named_where_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    run, limit = config(per_device_train_batch_size=16), 0.75 * 36 * GIB
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert name not in "".join(check_fits(run, QWEN, limit))
    monkeypatch.delenv(name)
    told = "".join(check_fits(run, QWEN, limit))
    assert f"{name}=0.92 in the environment gives 33.1 GiB, where this run would take " in told
    assert "; or --per_device_train_batch_size 8 --gradient_accumulation_steps 2 would take " in told
    # With a share of its own, fewer rows are enough; without, the rank would have to be halved too.
    with pytest.raises(ConfigError) as refused:
        check_fits(config(), QWEN, 18 * GIB)
    fewer, and_less = str(refused.value).split("; or ")
    assert "--lora_r" not in fewer
    assert "--lora_r 32" in and_less


def test_a_model_that_is_too_large_altogether_says_so() -> None:
    with pytest.raises(
        ConfigError, match="No setting of this model fits: its weights, adapters and optimizer alone take"
    ):
        check_fits(config(), shape_of(preset("llama-3.1-405b")), 70 * GIB)


def test_the_check_can_be_skipped() -> None:
    run = config(per_device_train_batch_size=64, skip_memory_check=True)
    assert "this may not fit" in check_fits(run, QWEN, 40 * GIB)[-1]
    assert run.decisive() == config(per_device_train_batch_size=64).decisive()


def test_a_cpu_is_told_nothing(tiny_gptq: Path) -> None:
    assert about_run(config(), CheckpointFolder(tiny_gptq)) == []


def card(gib: float) -> Any:
    return SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H200",
        compute_capability="9.0",
        memory_stats=lambda: {"bytes_limit": gib * GIB},
    )


def test_a_gpu_is_told_of_the_checkpoint_on_disk(monkeypatch: pytest.MonkeyPatch, tiny_gptq: Path) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [card(1)])
    memory, time = about_run(config(), CheckpointFolder(tiny_gptq))
    assert memory.startswith("memory       about 0.")
    assert time.startswith("time         about ")
    monkeypatch.setattr(jax, "local_devices", lambda: [card(1e-3)])
    with pytest.raises(ConfigError, match="--model: a step needs about"):
        about_run(config(), CheckpointFolder(tiny_gptq))


def test_train_says_it_after_the_summary_and_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_gptq: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    command = flags(tiny_gptq, tmp_path / "out", rows, dry_run=True)
    monkeypatch.setattr(train, "about_run", lambda config, base, length: [f"memory of rows of {length}"])
    assert train.main(command) == 0
    told = capsys.readouterr().out
    assert told.index("computed in") < told.index("memory of rows of 32") < told.index("rows         ")

    def refuse(*_: Any) -> list[str]:
        raise ConfigError("--model: too large")

    monkeypatch.setattr(train, "about_run", refuse)
    assert train.main(command) == 2
    assert "error: --model: too large" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
