"""Folders of other formats, opened: shown as GPTQ, or refused by a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lotaqaf_jax
from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.plan.command import read_shape
from lotaqaf_jax.quant.config import ModuleQuantization
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.quant.formats import read_quantization
from tests.quant.formats.foreign import folder_of, mlx, unstream

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
ASYMMETRIC = CHECKPOINTS / "ckpt-llamapos-b4g32-asym"
Q = "model.layers.0.self_attn.q_proj"
IDS = np.arange(24, dtype=np.int32)[None]

# How a GPTQ folder is written again; the numbers stay, and so does what is loaded.
SAME = [
    ("awq", "ckpt-llamapos-b4g32-asym"),
    ("compressed-tensors", "ckpt-llamapos-b4g32-asym"),
    ("compressed-tensors", "ckpt-llamapos-b3g32-asym"),
    ("compressed-tensors", "ckpt-qwen2-b4g32-sym-desc"),
    ("compressed-tensors", "ckpt-qwen2-b8g64-sym-partial"),
    ("mlx", "ckpt-llamapos-b4g32-asym"),
    ("mlx", "ckpt-llamapos-b3g32-asym"),
]


def leaves(model: Decoder) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.tree.map(np.asarray, model_state(model)))]


def model_state(model: Decoder) -> Any:
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model))


def changed(folder: Path, **change: Any) -> None:
    """Put keys into config.json; into the quantisation config, where they are in its ``said``."""
    whole = json.loads((folder / "config.json").read_text())
    whole.get("quantization", {}).update(change)
    whole["quantization_config"].update(change)
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(("kind", "name"), SAME)
@pytest.mark.filterwarnings("ignore:MLX's biases")
def test_loads_the_numbers_of_the_gptq_folder(kind: str, name: str, tmp_path: Path) -> None:
    """Every array of the decoder, words included, is bit for bit that of the GPTQ folder."""
    folder = CheckpointFolder(folder_of(kind, CHECKPOINTS / name, tmp_path / "model"))
    assert folder.format == kind
    expected = lotaqaf_jax.load_pretrained(CHECKPOINTS / name, progress=False)
    found = lotaqaf_jax.load_pretrained(tmp_path / "model", progress=False)
    for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert read_shape(str(tmp_path / "model")).spec.layers[0][0][1].quant is not None


@pytest.mark.parametrize(("kind", "name"), SAME[:2] + SAME[-1:])
def test_stored_tensors_lie_beside(kind: str, name: str, tmp_path: Path) -> None:
    folder = CheckpointFolder(folder_of(kind, CHECKPOINTS / name, tmp_path / "model"))
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert folder.stored.keys() == written.keys()
    assert folder.nbytes == sum(array.nbytes for array in written.values())
    for key in folder.tensors:
        entry, array = folder.tensors[key], folder.read(key)
        assert (entry.dtype, entry.shape, entry.nbytes) == (array.dtype, array.shape, array.nbytes), key
    for module in folder.quantized_modules:
        stored = folder.to_stored(module, folder.read(f"{module}.qweight"))
        np.testing.assert_array_equal(stored, written[folder.words_name(module)])
        assert stored.dtype == written[folder.words_name(module)].dtype


def test_a_channel_is_one_group(tmp_path: Path) -> None:
    """Strategy channel of compressed-tensors, with one scale for a column."""
    source = folder_of("compressed-tensors", ASYMMETRIC, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name, array in tensors.items():
        if name.endswith(("weight_scale", "weight_zero_point")):
            tensors[name] = np.ascontiguousarray(array[:, :1])
    save_file(tensors, source / "model.safetensors")
    whole = json.loads((source / "config.json").read_text())
    weights = whole["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights |= {"strategy": "channel", "group_size": None}
    (source / "config.json").write_text(json.dumps(whole))
    folder = CheckpointFolder(source)
    assert folder.quantization is not None
    assert folder.quantization.for_module(Q) == ModuleQuantization(4, -1, False, False)
    assert np.isfinite(lotaqaf_jax.load_pretrained(source, progress=False)(IDS)).all()


def test_compressed_tensors_targets(tmp_path: Path) -> None:
    """A target by name goes before a pattern, and that before the class."""
    source = folder_of("compressed-tensors", ASYMMETRIC, tmp_path / "model")
    whole = json.loads((source / "config.json").read_text())
    groups = whole["quantization_config"]["config_groups"]
    for i, targets in enumerate((["re:.*q_proj"], [Q], ["LlamaMLP"])):
        weights = groups["group_0"]["weights"] | {"num_bits": 8, "group_size": 16 * (i + 1)}
        groups[f"group_{i + 1}"] = groups["group_0"] | {"targets": targets, "weights": weights}
    (source / "config.json").write_text(json.dumps(whole))
    said = CheckpointFolder(source).quantization
    assert said is not None
    assert said.for_module(Q) == ModuleQuantization(8, 32, False, False)
    assert said.for_module(Q.replace("0", "1")) == ModuleQuantization(8, 16, False, False)
    assert said.for_module(Q.replace("q_proj", "k_proj")) == ModuleQuantization(4, 32, False, False)
    groups["group_0"]["targets"] = []
    (source / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=r"no target of config_groups matches model\.layers"):
        CheckpointFolder(source)


def test_an_unused_g_idx_is_none(tmp_path: Path) -> None:
    source = folder_of("compressed-tensors", CHECKPOINTS / "ckpt-qwen2-b4g32-sym-desc", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    assert f"{Q}.g_idx" in CheckpointFolder(source).tensors
    tensors[f"{Q}.weight_g_idx"] = np.full_like(tensors[f"{Q}.weight_g_idx"], -1)
    save_file(tensors, source / "model.safetensors")
    assert f"{Q}.g_idx" not in CheckpointFolder(source).tensors


def test_mlx_overrides_and_embedding(tmp_path: Path) -> None:
    """A module of its own width, one in 16 bit, and an embedding that is dequantised with a note."""
    source = folder_of("mlx", ASYMMETRIC, tmp_path / "model")
    dense, tensors = load_file(ASYMMETRIC / "model.safetensors"), load_file(source / "model.safetensors")
    rng, n = np.random.default_rng(0), dense["model.embed_tokens.weight"].shape
    q, scales = rng.integers(0, 256, n[::-1]), rng.uniform(0.001, 0.01, (n[1] // 32, n[0])).astype(np.float32)
    embedding = mlx(q, np.full(scales.shape, 100), scales, 8)
    tensors |= {f"model.embed_tokens.{part}": array for part, array in embedding.items()}
    shape = unstream(tensors[f"{Q}.weight"], 4, 1).shape[0], dense["model.norm.weight"].size
    tensors |= {f"{Q}.weight": rng.normal(size=shape).astype(np.float16)}
    del tensors[f"{Q}.scales"], tensors[f"{Q}.biases"]
    save_file(tensors, source / "model.safetensors")
    changed(source, **{"model.embed_tokens": {"bits": 8, "group_size": 32}, Q: False})
    with pytest.warns(UserWarning, match=r"embed_tokens is quantised to 8 bit; it is dequantised, and is not trained"):
        model = lotaqaf_jax.load_pretrained(source, progress=False)
    expected = np.repeat(scales.T, 32, axis=1).astype(np.float64) * (q.T - 100.0)
    table = model.embed_tokens.weight.get_value()
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)
    assert dict(model.spec.layers[0])["self_attn.q_proj"].quant is None
    assert dict(model.spec.layers[1])["self_attn.q_proj"].quant is not None


def test_mlx_says_what_rounding_costs(tmp_path: Path) -> None:
    """The largest residual of all modules, once for a model."""
    source = folder_of("mlx", ASYMMETRIC, tmp_path / "model", scales=ml_dtypes.bfloat16)
    tensors = load_file(source / "model.safetensors")
    ratios = [
        tensors[name].astype(np.float64) / tensors[name.replace("biases", "scales")].astype(np.float64)
        for name in tensors
        if name.endswith(".biases")
    ]
    residual = max(np.abs(ratio - np.round(ratio)).max() for ratio in ratios)
    with pytest.warns(UserWarning, match=re.escape(f"by up to {residual:.2g} of a step (in model.layers.")) as seen:
        lotaqaf_jax.load_pretrained(source, progress=False)
    assert len([one for one in seen if "of a step" in str(one.message)]) == 1


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("awq", {"bits": 8}, "bits is 8, expected 4, the width of AWQ"),
        ("awq", {"version": "GEMV_FAST"}, "version is 'gemv_fast', expected 'gemm'"),
        ("awq", {"group_size": 0}, "group_size is 0"),
        (
            "awq",
            {"quant_method": "hqq"},
            "quant_method is 'hqq', expected one of gptq, awq, compressed-tensors, or none",
        ),
        ("mlx", {"mode": "mxfp4"}, "quantization: mode is 'mxfp4', expected 'affine'"),
        ("mlx", {"bits": 6}, "quantization: bits: 6 is not a supported width"),
        ("mlx", {Q: {"bits": 5, "group_size": 32}}, f"quantization: {Q}: bits: 5 is not a supported width"),
        ("compressed-tensors", {"format": "int-quantized"}, "group_0']: format is 'int-quantized', expected 'pack-"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        ("compressed-tensors", {"transform_config": {"R1": 1}}, "transform_config is set"),
        ("compressed-tensors", {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config has format 'sparse-24'"),
        ("compressed-tensors", {"config_groups": {}}, "config_groups is missing or empty"),
        ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, "['W4A16']: found no scheme of weights"),
    ],
)
def test_settings_that_are_refused(kind: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = folder_of(kind, ASYMMETRIC, tmp_path / "model")
    changed(source, **change)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        CheckpointFolder(source)
    assert str(source / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "tensor"}, "strategy 'tensor', expected 'int' and 'group' or 'channel'"),
        ({"type": "float"}, "weights of type 'float'"),
        ({"num_bits": 6}, "weights: bits: 6 is not a supported width"),
        ({"group_size": None}, "weights: group_size is None"),
    ],
)
def test_schemes_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = folder_of("compressed-tensors", ASYMMETRIC, tmp_path / "model")
    whole = json.loads((source / "config.json").read_text())
    whole["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (source / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=re.escape(message)):
        CheckpointFolder(source)
    whole["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    (source / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="input_activations are quantised too"):
        CheckpointFolder(source)


@pytest.mark.parametrize(
    ("kind", "part", "dtype"),
    [
        ("awq", "qzeros", np.int64),
        ("awq", "qweight", np.int16),
        ("mlx", "biases", np.float64),
        ("mlx", "weight", np.int32),
        ("compressed-tensors", "weight_zero_point", np.int8),
        ("compressed-tensors", "weight_scale", np.float64),
    ],
)
def test_tensors_of_another_type_or_gone(kind: str, part: str, dtype: Any, tmp_path: Path) -> None:
    source = folder_of(kind, ASYMMETRIC, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    kept = tensors[f"{Q}.{part}"]
    tensors[f"{Q}.{part}"] = kept.astype(dtype)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q}.{part}: found {np.dtype(dtype)} .* expected a matrix of"):
        CheckpointFolder(source)
    if part in ("qzeros", "biases", "weight_zero_point", "weight_scale"):
        del tensors[f"{Q}.{part}"]
        save_file(tensors, source / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{Q}.{part}: missing"):
            CheckpointFolder(source)


def test_shapes_are_checked_against_the_config(tmp_path: Path) -> None:
    source = folder_of("awq", ASYMMETRIC, tmp_path / "model")
    changed(source, group_size=64)
    with pytest.raises(CheckpointError, match=r"q_proj.qzeros: found shape .* expected"):
        lotaqaf_jax.load_pretrained(source, progress=False)


def test_mlx_biases_that_are_no_zero_points_are_refused(tmp_path: Path) -> None:
    source = folder_of("mlx", ASYMMETRIC, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{Q}.biases"] = (tensors[f"{Q}.biases"] + 0.3 * tensors[f"{Q}.scales"]).astype(np.float16)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q}.biases: -biases/scales is up to 0\.\d+ of a step"):
        lotaqaf_jax.load_pretrained(source, progress=False)


def test_plan_reads_the_config_alone(tmp_path: Path) -> None:
    for kind in ("awq", "mlx", "compressed-tensors"):
        whole = json.loads((folder_of(kind, ASYMMETRIC, tmp_path / kind) / "config.json").read_text())
        said = read_quantization(whole)
        assert said is not None
        assert (said.default.bits, said.default.group_size) == (4, 32)
    assert read_quantization({"model_type": "llama"}) is None
