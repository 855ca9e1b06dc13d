"""Which folders a run may begin or go on in, and what it clears away."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.training import TrainConfig, prepare_output
from lotaqaf_jax.training.output import SETTINGS


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model="m", dataset="d", output_dir=str(tmp_path / "out"), lora_r=8, resume_from_checkpoint="auto"
    )


def fill(config: TrainConfig, *files: str) -> Path:
    output = Path(config.output_dir)
    for name in files:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("old")
    return output


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


def test_a_new_folder_gets_the_settings_of_the_run(config: TrainConfig) -> None:
    prepare_output(config)
    output = Path(config.output_dir)
    assert names(output) == {SETTINGS}
    assert json.loads((output / SETTINGS).read_text()) == json.loads(json.dumps(config.decisive()))
    prepare_output(config)
    assert names(output) == {SETTINGS}


def test_auto_goes_on_where_there_is_a_checkpoint(config: TrainConfig) -> None:
    # Without settings, as an earlier release left it.
    files = ("checkpoints/4/state", "trainer_log.jsonl", "adapter/adapter_config.json", "mine.txt")
    output = fill(config, *files, "settings.partial", "trainer_log.partial")
    prepare_output(config)
    assert names(output) == {"checkpoints", "trainer_log.jsonl", "adapter", "mine.txt"}


def test_auto_begins_again_where_the_same_run_had_no_checkpoint_yet(config: TrainConfig) -> None:
    prepare_output(config)
    output = fill(config, "checkpoints/1.orbax-checkpoint-tmp/state", "trainer_log.jsonl", "runs/events", "mine.txt")
    fill(config, "adapter/adapter_config.json", "checkpoints.dropped/3/state")
    passing = dataclasses.replace(config, logging_steps=7, save_steps=3)
    prepare_output(passing)
    # What was exported by the same settings stays until it is exported again.
    assert names(output) == {SETTINGS, "adapter", "mine.txt"}


@pytest.mark.parametrize("begun", ["with other settings", "by someone else", "and the settings are damaged"])
def test_auto_does_not_touch_what_is_not_of_the_same_run(config: TrainConfig, begun: str) -> None:
    output = fill(config, "adapter/adapter_config.json", "trainer_log.jsonl")
    if begun == "with other settings":
        (output / SETTINGS).write_text(json.dumps(dataclasses.replace(config, seed=5).decisive()))
    if begun == "and the settings are damaged":
        (output / SETTINGS).write_text("[")
    with pytest.raises(ConfigError, match="not begun with these settings"):
        prepare_output(config)
    assert (output / "adapter" / "adapter_config.json").exists()
    prepare_output(dataclasses.replace(config, overwrite_output_dir=True))
    assert names(output) == {SETTINGS}


def test_latest_wants_a_checkpoint_folder_and_nothing_wants_an_empty_one(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        prepare_output(dataclasses.replace(config, resume_from_checkpoint="latest"))
    prepare_output(dataclasses.replace(config, resume_from_checkpoint=None))
    with pytest.raises(ConfigError, match="not empty"):
        prepare_output(dataclasses.replace(config, resume_from_checkpoint=None))


@pytest.mark.parametrize("stop_at", range(12))
def test_overwriting_may_be_killed_anywhere(config: TrainConfig, stop_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint of the old run is ever found in a folder with the settings of the new one."""
    old = dataclasses.replace(config, seed=5, resume_from_checkpoint=None)
    prepare_output(old)
    output = fill(old, "checkpoints/4/state/data", "checkpoints/6/state/data", "adapter/x", "trainer_log.jsonl")
    new = dataclasses.replace(config, overwrite_output_dir=True, resume_from_checkpoint=None)
    left = [stop_at]

    class Killed(BaseException):
        pass

    def counted(function: object) -> object:
        def inner(*arguments: object, **more: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*arguments, **more)  # type: ignore[operator]

        return inner

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            prepare_output(new)
        except Killed:
            saved = (output / "checkpoints").exists()
            of_the_new = json.loads((output / SETTINGS).read_text())["seed"] == new.seed
            assert not (saved and of_the_new)
    prepare_output(new)
    assert names(output) == {SETTINGS}
    prepare_output(config)
