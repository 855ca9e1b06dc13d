"""Adapters survive the disk, and are refused on any other base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from lotaqaf_jax.errors import AdapterError, ConfigError
from lotaqaf_jax.models import Decoder, adapted_linears, add_lora, add_qalora, linears
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model, checkpoint
from tests.models.tiny import set_random_low_rank


@pytest.fixture(scope="module")
def plain(base: CheckpointFolder) -> Decoder:
    return load_decoder(base, progress=False)


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_exact(base: CheckpointFolder, model: Decoder, plain: Decoder, adapter: Path) -> None:
    loaded = convert.load_adapter(plain, adapter, base=base)
    for (names, _, saved), (found, _, read) in zip(adapted_linears(model), adapted_linears(loaded), strict=True):
        assert names == found
        np.testing.assert_array_equal(saved.a, read.a)
        np.testing.assert_array_equal(saved.b, read.b)
        np.testing.assert_array_equal(saved.omega, read.omega)
        assert (saved.offset, saved.offset_dtype) == (read.offset, read.offset_dtype)
        assert read.a.dtype == np.int8
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.lota_A"].shape == (96, 8)
    assert tensors["model.layers.1.mlp.down_proj.lota_B"].shape == (8, 64)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["method"], config["rank"], config["omega"], config["offset"]) == ("lota-qaf", 8, 3.0, "reference")


def test_thresholds_of_their_own_survive_too(base: CheckpointFolder, plain: Decoder, tmp_path: Path) -> None:
    model = adapter_model(base)
    for i, (_, linear, adapter) in enumerate(adapted_linears(model)):
        omegas = (i + jnp.arange(len(adapter.a))) % 7 + 0.5
        linear.set_adapters(dataclasses.replace(adapter, omega=omegas))
    convert.save_adapter(model, tmp_path / "adapter", base=base)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["omega"]
    loaded = convert.load_adapter(plain, tmp_path / "adapter", base=base)
    for (names, _, saved), (_, _, read) in zip(adapted_linears(model), adapted_linears(loaded), strict=True):
        assert [written[name] for name in names] == np.asarray(saved.omega).tolist() == np.asarray(read.omega).tolist()
    name = "model.layers.1.mlp.up_proj"
    for omega, says in (
        ({k: v for k, v in written.items() if k != name}, f"{name} is None"),
        ({name: "a"}, "found 'a'"),
    ):
        edit(tmp_path / "adapter", omega=omega)
        with pytest.raises(AdapterError, match=says):
            convert.load_adapter(plain, tmp_path / "adapter", base=base)


def test_qalora_round_trip_is_exact(base: CheckpointFolder, plain: Decoder, tmp_path: Path) -> None:
    model = add_qalora(plain, rank=3, alpha=5.0, pool="mean", offset_dtype="bfloat16")
    set_random_low_rank(model)
    convert.save_adapter(model, tmp_path / "adapter", base=base)
    loaded = convert.load_adapter(plain, tmp_path / "adapter", base=base)
    for (names, _, saved), (found, _, read) in zip(adapted_linears(model), adapted_linears(loaded), strict=True):
        assert names == found
        assert type(saved) is type(read)
        np.testing.assert_array_equal(saved.a, read.a)
        np.testing.assert_array_equal(saved.b, read.b)
        assert (saved.alpha, saved.pool, saved.offset_dtype) == (read.alpha, read.pool, read.offset_dtype)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.qalora_A"].shape == (3, 3)
    assert tensors["model.layers.1.mlp.down_proj.qalora_B"].shape == (3, 64)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["method"], config["rank"], config["alpha"], config["pool"]) == ("qa-lora", 3, 5.0, "mean")
    edit(tmp_path / "adapter", pool="most")
    with pytest.raises(AdapterError, match="pool: found 'most'"):
        convert.load_adapter(plain, tmp_path / "adapter", base=base)


def test_adapters_of_two_kinds_are_no_adapter(base: CheckpointFolder, plain: Decoder, tmp_path: Path) -> None:
    model, other = add_lora(plain, rank=2), add_qalora(plain, rank=2)
    (_, linear), (_, lent) = next(linears(model)), next(linears(other))
    linear.set_adapters(lent.adapters)
    with pytest.raises(AdapterError, match=r"several kinds \(GroupLowRank, LowRank\)"):
        convert.save_adapter(model, tmp_path / "adapter", base=base)


def test_another_base_is_an_error(adapter: Path) -> None:
    """The same model in symmetric form has every shape right, and is another base."""
    folder = checkpoint("ckpt-llamapos-b4g32-asym")
    assert folder is not None
    other = CheckpointFolder(folder)
    with pytest.raises(AdapterError, match="trained on another base"):
        convert.load_adapter(load_decoder(other, progress=False), adapter, base=other)


def test_merged_model_is_another_base(exported: tuple[Path, object], base: CheckpointFolder) -> None:
    assert convert.fingerprint(CheckpointFolder(exported[0])) != convert.fingerprint(base)


def test_fingerprint_is_of_the_tensors_not_of_the_files(base: CheckpointFolder, tmp_path: Path) -> None:
    """Two shards and an index, other metadata, another 16-bit tensor: still the same quantised weights."""
    tensors = load_file(base.path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(base.path / "config.json", tmp_path)
    assert convert.fingerprint(CheckpointFolder(tmp_path)) == convert.fingerprint(base)

    tensors[(name := "model.layers.0.mlp.up_proj.scales")][0, 0] *= 2
    save_file({n: tensors[n] for n in shards["a.safetensors"]}, tmp_path / "a.safetensors")
    save_file({n: tensors[n] for n in shards["b.safetensors"]}, tmp_path / "b.safetensors")
    assert name in tensors
    assert convert.fingerprint(CheckpointFolder(tmp_path)) != convert.fingerprint(base)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "lora"}, "method is 'lora'"),
        ({"format_version": 2}, "format_version is 2"),
        ({"rank": 4}, r"expected int8 \(64, 4\)"),
        ({"omega": 8}, "0 < omega < rank"),
        ({"omega": "many"}, "omega is 'many'"),
        ({"offset": "some"}, "offset: found 'some'"),
        ({"offset_dtype": "int8"}, "offset_dtype is 'int8'"),
    ],
)
def test_bad_config_is_named(
    copy: Path, base: CheckpointFolder, plain: Decoder, changes: dict[str, object], says: str
) -> None:
    edit(copy, **changes)
    with pytest.raises(AdapterError, match=says):
        convert.load_adapter(plain, copy, base=base)


def test_bad_tensors_are_named(copy: Path, base: CheckpointFolder, plain: Decoder) -> None:
    path = copy / "adapter_model.safetensors"
    good = load_file(path)
    name = "model.layers.1.self_attn.q_proj.lota_B"

    def refused(tensors: dict[str, np.ndarray], says: str) -> None:
        save_file(tensors, path)
        with pytest.raises(AdapterError, match=says):
            convert.load_adapter(plain, copy, base=base)

    bad = good[name].copy()
    bad[2, 3] = 2
    refused(good | {name: bad}, rf"{name}: 1 of 512 values are not -1, 0 or 1, the first 2 at \(2, 3\)")
    refused({key: value for key, value in good.items() if key != name}, f"{name} is missing")
    refused(good | {name: good[name].astype(np.float32)}, f"{name} is float32")
    refused(good | {"model.layers.9.x.lota_A": bad}, "no place in")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="truncated"):
        convert.load_adapter(plain, copy, base=base)


def test_missing_folder_is_named(base: CheckpointFolder, plain: Decoder, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        convert.load_adapter(plain, tmp_path / "none", base=base)


def test_saving_needs_adapters_and_an_empty_folder(base: CheckpointFolder, plain: Decoder, adapter: Path) -> None:
    with pytest.raises(AdapterError, match="no adapters"):
        convert.save_adapter(plain, adapter.parent / "other", base=base)
    with pytest.raises(ConfigError, match="not empty"):
        convert.save_adapter(adapter_model(base, targets=["q_proj"]), adapter, base=base)
