"""The command line: flags people know, a file below them, and sentences for what is wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from lotaqaf_jax.data import FORMATS
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.training import TrainConfig, parse_config
from lotaqaf_jax.training import config as config_module

BASE = ["--model", "folder", "--dataset", "rows.jsonl"]

PROMISED = [
    "method",
    "model",
    "dataset",
    "output_dir",
    "max_seq_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "lora_r",
    "omega",
    "offset",
    "sigma_schedule",
    "lora_alpha",
    "learning_rate",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "qalora_pool",
    "target_modules",
    "packing",
    "gradient_checkpointing",
    "seed",
    "logging_steps",
    "eval_steps",
    "val_size",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "max_samples",
    "dry_run",
    "overwrite_output_dir",
    "config",
]


@pytest.mark.parametrize("name", PROMISED)
def test_promised_flags_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_config(["--help"])
    assert left.value.code == 0
    assert f"--{name} " in capsys.readouterr().out.replace("\n", " ")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("lora_r: 16\nomega: 4.5\npacking: true\ntarget_modules: [q_proj, v_proj]\n")
    config = parse_config([*BASE, "--config", str(file), "--omega", "3"])
    assert (config.lora_r, config.omega, config.packing) == (16, 3, True)
    assert config.target_modules == ["q_proj", "v_proj"]


def test_file_can_name_model_and_dataset(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: folder\ndataset: rows.jsonl\n")
    assert parse_config(["--config", str(file)]).dataset == "rows.jsonl"


def test_rank_comes_from_the_known_model() -> None:
    assert parse_config(["--model", "qwen2.5-32b-gptq", "--dataset", "x"]).rank == 32
    assert parse_config(["--model", "qwen2.5-14b-gptq", "--dataset", "x"]).rank == 64
    assert parse_config(["--model", "qwen2.5-32b-gptq", "--dataset", "x", "--lora_r", "8"]).rank == 8


def test_known_models_train_on_the_published_batch() -> None:
    assert parse_config(["--model", "qwen2.5-14b-gptq", "--dataset", "x"]).train_batch_size == 64
    assert parse_config(BASE).train_batch_size == 8
    assert parse_config([*BASE, "--gradient_accumulation_steps", "3"]).train_batch_size == 24


@pytest.mark.parametrize("spelling", [["--packing"], ["--packing", "true"], ["--packing", "True"]])
def test_spellings_of_a_switch(spelling: list[str]) -> None:
    assert parse_config([*BASE, *spelling]).packing is True


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--lora_r", "1"], "rank"),
        (["--lora_r", "16", "--omega", "16"], "omega"),
        (["--lora_r", "16", "--omega", "0"], "omega"),
        (["--omega", "-1"], "omega"),
        (["--max_steps", "0"], "max_steps"),
        (["--num_train_epochs", "0"], "num_train_epochs"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
        (["--beta", "1"], "beta"),
        (["--float8", "true", "--dtype", "float32"], "float8"),
        (["--save_total_limit", "0"], "save_total_limit"),
        (["--method", "lora", "--lora_r", "0"], "rank"),
        (["--method", "lora", "--lora_alpha", "0"], "alpha"),
        (["--method", "lora", "--learning_rate", "0"], "learning_rate"),
        (["--method", "lora", "--learning_rate", "nan"], "learning_rate"),
        (["--method", "qalora", "--max_grad_norm", "-1"], "max_grad_norm"),
        (["--method", "qalora", "--weight_decay", "-1"], "weight_decay"),
        (["--method", "qalora", "--warmup_ratio", "1"], "warmup_ratio"),
    ],
)
def test_out_of_range_names_the_flag(flags: list[str], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        parse_config([*BASE, *flags])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("omegga: 4", "did you mean 'omega'"),
        ("[1, 2]", "expected settings"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_file_is_refused_in_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        parse_config([*BASE, "--config", str(file)])


def test_missing_file_model_or_dataset() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        parse_config([*BASE, "--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match="--dataset"):
        parse_config(["--model", "folder"])
    with pytest.raises(ConfigError, match="--model"):
        parse_config(["--dataset", "rows.jsonl"])


def test_unknown_flag_leaves_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_config([*BASE, "--learning_pace", "1e-4"])
    assert left.value.code == 2
    assert "--learning_pace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "flags", "expected"),
    [
        ((9, 0), ["--dtype", "bfloat16"], True),
        ((9, 0), ["--dtype", "bfloat16", "--float8", "false"], False),
        ((9, 0), ["--dtype", "float32"], False),
        ((8, 9), ["--dtype", "bfloat16"], False),
        ((8, 9), ["--dtype", "bfloat16", "--float8", "true"], True),
        (None, ["--dtype", "bfloat16"], False),
    ],
)
def test_float8_is_for_hopper_and_16_bits(
    capability: tuple[int, int] | None, flags: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotaqaf_jax.training.config.compute_capability", lambda: capability)
    assert parse_config([*BASE, *flags]).takes_float8 is expected


@pytest.mark.parametrize("method", ["lota", "lora", "qalora"])
def test_settings_of_another_method_are_refused_by_name(method: Any, tmp_path: Path) -> None:
    """Also with the value that they have anyway, in a file, and in Python."""
    others = {name: only for name, only in config_module._ONLY.items() if method not in only}
    assert others
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for name, only in others.items():
        value = {"omega": 3, "float8": "false", "lora_alpha": 8, "moved": 0.1, "offset": "none"}.get(
            name, defaults[name]
        )
        value = {"optimizer": "ternary_adam", "surrogate": "window"}.get(name, value)
        says = f"--{name}: is a setting of --method {' or '.join(only)}, found with --method {method}"
        for flags in (["--method", method, f"--{name}", str(value)], [f"--{name}={value}", f"--method={method}"]):
            with pytest.raises(ConfigError, match=says):
                parse_config([*BASE, *flags])
    file = tmp_path / "settings.yaml"
    name = next(iter(others))
    number = next(name for name in others if name in ("omega", "lora_alpha"))
    file.write_text(f"method: {method}\n{number}: 3\n")
    with pytest.raises(ConfigError, match=f"--{number}: is a setting"):
        parse_config([*BASE, "--config", str(file)])
    with pytest.raises(ConfigError, match=f"--{number}: is a setting"):
        TrainConfig(method=method, model="folder", dataset="rows.jsonl", **{number: 3})


def test_a_recipe_is_what_its_settings_are_where_they_are_not_given() -> None:
    def of(*flags: str) -> tuple[Any, ...]:
        config = parse_config([*BASE, *flags])
        rule = (config.ternary_optimizer, config.gradient, config.offset_rule, config.share, config.threshold)
        return (*rule, config.peak_rate, config.scheduler)

    recommended = ("ternary_adam", "window", "none", 0.04, 1.0, 0.2, "cosine")
    assert of() == of("--recipe", "recommended") == recommended
    assert of("--recipe", "published", "--lora_r", "32")[:5] == ("t_signsgd", "straight", "reference", None, 24)
    assert of("--omega", "5")[3:5] == (None, 5)
    assert of("--recipe", "published", "--moved", "0.1")[3:5] == (0.1, 1)
    assert of("--optimizer", "t_signsgd", "--offset", "paper", "--surrogate", "straight")[:4] == (
        "t_signsgd", "straight", "paper", 0.04,
    )  # fmt: skip
    assert of("--learning_rate", "0.3", "--lr_scheduler_type", "constant")[5:] == (0.3, "constant")


def test_the_share_that_moves_goes_by_data_and_width_where_it_is_left_out() -> None:
    def of(data_format: str, *flags: str, bits: int = 4) -> float | None:
        config = parse_config([*BASE, *flags]).settled(data_format, bits)
        assert config == config.settled("text", 3)  # settled once, it stays
        return config.share

    assert [of("text", bits=bits) for bits in (2, 3, 4, 8)] == [0.04, 0.02, 0.04, 0.04]
    assert {of(name, bits=bits) for name in FORMATS if name != "text" for bits in (2, 3, 4, 8)} == {0.15}
    assert of("viggo", "--moved", "0.3") == 0.3
    assert of("viggo", "--omega", "8") is None
    assert of("viggo", "--recipe", "published") is None
    lora = parse_config([*BASE, "--method", "lora"])
    assert lora.settled("viggo", 4) == lora


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--moved", "0.1", "--omega", "3"], "--moved and --omega both set the threshold"),
        (["--moved", "1.5"], "moved: found 1.5, expected a share"),
        (["--beta", "0.9"], "--beta: is a setting of --optimizer t_signsgd, found with ternary_adam"),
        (
            ["--recipe", "published", "--learning_rate", "0.1"],
            "--learning_rate: is a setting of --optimizer ternary_adam",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config([*BASE, *flags])


def test_help_says_whose_a_setting_is() -> None:
    for field in dataclasses.fields(TrainConfig):
        only = config_module._ONLY.get(field.name)
        begins = re.match(r"((?:lota|lora|qalora)(?:, (?:lota|lora|qalora))*): ", field.metadata["help"])
        if field.name != "method":
            assert (tuple(begins[1].split(", ")) if begins else None) == only, field.name


@pytest.mark.parametrize("method", ["lora", "qalora"])
def test_the_shipped_run_with_a_baseline(method: str) -> None:
    config = parse_config(["--method", method])
    assert (config.lora_r, config.max_steps, config.omega) == (32, 60, None)
    assert config.alpha == 64


@pytest.mark.parametrize(
    ("model", "dataset", "rate"),
    [
        ("folder", "rows.jsonl", 5e-4),
        ("qwen2.5-14b-gptq", "gsm8k", 5e-4),
        ("llama-3.3-70b-gptq", "viggo:file.csv", 1e-4),
        ("llama-3.1-8b-gptq", "alpaca", 1e-5),
        ("qwen2.5-32b-gptq", "alpaca:file.json", 5e-6),
    ],
)
def test_the_published_learning_rate_goes_by_size_and_data(model: str, dataset: str, rate: float) -> None:
    flags = ["--method", "lora", "--model", model, "--dataset", dataset]
    assert parse_config(flags).peak_rate == rate
    assert parse_config([*flags, "--learning_rate", "3e-3"]).peak_rate == 3e-3
