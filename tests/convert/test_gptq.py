"""The merged folder is the base with only qweight changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import convert
import lotaqaf_jax
from convert.gptq import signed
from convert.hf_config import WRITER
from convert.verify import Report
from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model, checkpoint


def test_only_words_change(base: CheckpointFolder, exported: tuple[Path, Report]) -> None:
    """By the bytes of the file: all that differs lies in the ranges of qweight, and the header is the same."""
    merged = exported[0]
    old, new = ((folder / "model.safetensors").read_bytes() for folder in (base.path, merged))
    assert len(old) == len(new)
    differs = np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8)
    allowed = np.zeros(len(old), bool)
    for name, entry in base.tensors.items():
        if name.endswith(".qweight"):
            allowed[entry.start : entry.stop] = True
    assert differs.any()
    assert not (differs & ~allowed).any()


def test_files_beside_the_weights(base: CheckpointFolder, exported: tuple[Path, Report]) -> None:
    merged = exported[0]
    names = {path.name for path in merged.iterdir()}
    assert names == {
        "config.json",
        "quantize_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "offset_adapter",
        "README.md",
    }
    # The card is its own, not the base's.
    own = {"config.json", "quantize_config.json", "model.safetensors", "offset_adapter", "README.md"}
    for name in names - own:
        assert (merged / name).read_bytes() == (base.path / name).read_bytes()


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_configs_gain_our_name_and_nothing_else(
    base: CheckpointFolder, exported: tuple[Path, Report], name: str
) -> None:
    old, new = ((folder / name).read_text() for folder in (base.path, exported[0]))
    lines = [line for line in new.splitlines() if WRITER not in line]
    assert [line.rstrip(",") for line in old.splitlines()] == [line.rstrip(",") for line in lines]
    parsed = json.loads(new)
    quantization = parsed["quantization_config"] if name == "config.json" else parsed
    assert quantization["meta"]["quantizer"] == ["gptqmodel:7.6.0", WRITER]


@pytest.mark.parametrize(
    ("config", "writers"),
    [
        ({"bits": 4}, [WRITER]),
        ({"bits": 4, "meta": None}, [WRITER]),
        ({"bits": 4, "meta": {"quantizer": "gptqmodel:1.1.0"}}, ["gptqmodel:1.1.0", WRITER]),
        ({"bits": 4, "meta": {"quantizer": ["a:1", WRITER], "uri": "x"}}, ["a:1", WRITER]),
    ],
)
def test_signature_on_other_writers_configs(config: dict[str, object], writers: list[str]) -> None:
    text = json.dumps(config)
    once = signed(text, nested=False)
    assert json.loads(once)["meta"]["quantizer"] == writers
    assert "\n" not in once
    assert signed(once, nested=False) == once
    nested = json.loads(signed(json.dumps({"quantization_config": config}), nested=True))
    assert nested["quantization_config"]["meta"]["quantizer"] == writers


def test_config_without_quantization_stays(base: CheckpointFolder) -> None:
    """The quantisation of some files is in quantize_config.json alone."""
    text = '{"model_type": "llama"}'
    assert signed(text, nested=True) == text


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("ckpt-qwen2-b8g64-sym-partial", "reference"),
        ("ckpt-llamapos-b3g32-asym", "reference"),
        ("ckpt-llamapos-b3g32-asym", "paper"),
        ("ckpt-llama-b4g32-sym-dynamic", "reference"),
        ("ckpt-llama-b4g32-sym-dynamic", "none"),
    ],
)
def test_every_format_and_rule_passes_its_own_proof(name: str, offset: str, tmp_path: Path) -> None:
    folder = checkpoint(name)
    assert folder is not None
    base = CheckpointFolder(folder)
    model = adapter_model(base, offset=offset, targets=["q_proj", "down_proj"])
    report = convert.merge_and_save(model, tmp_path / "merged", base=base, progress=False)
    assert report.moved_share > 0
    assert (tmp_path / "merged" / "offset_adapter").is_dir() == (offset != "none")


def test_shards_and_index_stay(shared: Path, tmp_path: Path) -> None:
    base = CheckpointFolder(shared / "checkpoints" / "format" / "ckpt-sharded-llama-b4g32-sym")
    convert.merge_and_save(adapter_model(base), tmp_path / "merged", base=base, progress=False)
    assert [p.name for p in CheckpointFolder(tmp_path / "merged").shards] == [p.name for p in base.shards]
    index = "model.safetensors.index.json"
    assert (tmp_path / "merged" / index).read_bytes() == (base.path / index).read_bytes()


def test_refuses_adapters_that_are_not_merged(base: CheckpointFolder, model: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not merged"):
        convert.save_pretrained(model, tmp_path / "out", base=base)


def test_refuses_the_words_of_another_model(base: CheckpointFolder, tmp_path: Path) -> None:
    folder = checkpoint("ckpt-llamapos-b4g32-asym")
    with pytest.raises(CheckpointError, match="scales are not those of"):
        convert.save_pretrained(lotaqaf_jax.load_pretrained(folder, progress=False), tmp_path / "out", base=base)
    assert list(tmp_path.iterdir()) == []


def test_refuses_an_unknown_target(base: CheckpointFolder, model: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of base, gptq"):
        convert.save_pretrained(model, tmp_path / "out", base=base, target="floppy")


def test_offsets_are_applied_or_their_absence_is_said(exported: tuple[Path, Report], model: Decoder) -> None:
    ids = np.arange(8, dtype=np.int32)[None]
    with pytest.warns(UserWarning, match=r"not applied.*convert.load_merged"):
        without = lotaqaf_jax.load_pretrained(exported[0], progress=False)
    merged = convert.load_merged(exported[0], progress=False)
    np.testing.assert_array_equal(merged(ids), model(ids))
    assert not np.array_equal(without(ids), model(ids))


def test_offset_adapter_adds_what_mu_adds(exported: tuple[Path, Report], model: Decoder) -> None:
    """x @ A.T @ B.T equals x @ (W' - W of the integers alone), in float64 from the files, act-order included."""
    lora = load_file(exported[0] / "offset_adapter" / "adapter_model.safetensors")
    exact = load_file(exported[0] / "offset_adapter" / "lota_offset.safetensors")
    words = load_file(exported[0] / "model.safetensors")
    config = json.loads((exported[0] / "offset_adapter" / "adapter_config.json").read_text())
    x = np.random.default_rng(0).normal(size=(5, 96))
    for name, mu in exact.items():
        module = name.removesuffix(".offset")
        a, b = (lora[f"base_model.model.{module}.{part}.weight"].astype(np.float64) for part in ("lora_A", "lora_B"))
        g_idx = words[f"{module}.g_idx"]
        step = (words[f"{module}.scales"].astype(np.float64) * mu)[g_idx]
        rows = x[:, : len(g_idx)]
        np.testing.assert_allclose(rows @ a.T @ b.T, rows @ step, rtol=1e-5, atol=1e-6)
        assert a.shape[0] == mu.shape[0] <= config["r"]
    assert config["lora_alpha"] == config["r"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"]
