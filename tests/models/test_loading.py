"""Checkpoint folder to decoder: what is accepted, and what is said about a checkpoint that does not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.models import DecoderConfig, linears, load_pretrained, loading
from lotaqaf_jax.models.loading import _Reader, _Zeros, read_spec
from lotaqaf_jax.quant import QuantizedWeight, decode_zeros, encode_zeros, pack
from lotaqaf_jax.quant.folder import CheckpointFolder

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
PLAIN = CHECKPOINTS / "ckpt-llamapos-b4g32-asym"
Q_PROJ = "model.layers.0.self_attn.q_proj"
IDS = jnp.asarray(np.load(PLAIN / "logits.npz")["input_ids"])

Tensors = dict[str, np.ndarray]


def rewritten(
    tmp_path: Path,
    change: Callable[[Tensors], Any] = lambda tensors: None,
    source: Path = PLAIN,
    quantization: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A copy of a checkpoint with some tensors and config keys changed in place."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    whole = json.loads((source / "config.json").read_text()) | config
    whole["quantization_config"] |= quantization or {}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def load(folder: Path) -> Any:
    return load_pretrained(folder, dtype=jnp.float32, progress=False)


def spec_of(folder: Path) -> Any:
    """Settle the shapes alone, which is where most problems are found."""
    opened = CheckpointFolder(folder)
    return read_spec(opened, DecoderConfig.from_hf(opened.config))


@pytest.mark.parametrize("most", [0, 2, 3, 4, 100], ids=lambda most: f"{most} tensors at once")
@pytest.mark.parametrize("decoded", [False, True])
def test_a_stack_is_the_same_however_many_tensors_go_at_once(
    tmp_path: Path, most: int, decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"layer{i}": np.random.default_rng(i).integers(-9, 9, (3, 5), dtype=np.int32) for i in range(4)}
    shutil.copy(PLAIN / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    counted: list[int] = []
    monkeypatch.setattr(loading, "_SHARE", 20)  # so that a tensor is copied in parts
    with ThreadPoolExecutor(2) as threads:
        reader = _Reader(CheckpointFolder(tmp_path), counted.append, threads)
        reader.most = most * tensors["layer0"].nbytes
        like = jax.ShapeDtypeStruct((4, 3, 40), jnp.uint8) if decoded else jax.ShapeDtypeStruct((4, 3, 5), jnp.int32)
        stack = reader.stack(list(tensors), like, decode=_Zeros(4, 40, "gptq_v2") if decoded else None)
    words = np.stack(list(tensors.values()))
    np.testing.assert_array_equal(stack, decode_zeros(words, 4, 40, "gptq_v2") if decoded else words)
    assert sum(counted) == sum(array.nbytes for array in tensors.values())


def test_words_arrive_as_they_are_in_the_file() -> None:
    stored = load_file(CHECKPOINTS / "ckpt-llama-b4g32-asym-desc" / "model.safetensors")
    model = load(CHECKPOINTS / "ckpt-llama-b4g32-asym-desc")
    seen = set()
    for names, linear in linears(model):
        linear.packed.validate(stacked=1)
        for i, name in enumerate(names):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], linear.packed)
            for part, array in layer.to_gptq().items():
                np.testing.assert_array_equal(array, stored[f"{name}.{part}"], err_msg=f"{name}.{part}")
                seen.add(f"{name}.{part}")
    rest = {name for name in stored if name not in seen}
    assert all(name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight")) for name in rest)
    np.testing.assert_array_equal(model.embed_tokens.weight.get_value(), stored["model.embed_tokens.weight"])
    types = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))}
    assert types == {"float16", "int32", "uint8"}, "everything keeps its stored type"


def test_nothing_of_the_model_is_a_view_of_the_file(tmp_path: Path) -> None:
    """A file that is overwritten after loading, as when a run saves over its input, does not change the model."""
    folder = tmp_path / "copy"
    shutil.copytree(PLAIN, folder)
    model = load(folder)
    before = np.array(model(IDS))
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(16)
        stream.write(b"\xff" * (file.stat().st_size - 16))
    np.testing.assert_array_equal(model(IDS), before)


def test_a_g_idx_that_says_nothing_new_or_is_absent_is_not_held(tmp_path: Path) -> None:
    expected = load(PLAIN)
    assert all(linear.packed.g_idx is None for _, linear in linears(expected))

    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    np.testing.assert_array_equal(load(rewritten(tmp_path, drop))(IDS), expected(IDS))


def test_biases_of_zeros_and_recomputed_buffers_are_accepted(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{Q_PROJ}.bias"] = np.zeros(64, np.float16)
        tensors["model.layers.1.mlp.down_proj.bias"] = np.zeros(64, np.float16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    spec_of(rewritten(tmp_path, add))


def test_a_bias_that_is_not_zero_has_no_place(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{Q_PROJ}.bias"] = np.eye(1, 64, 5, dtype=np.float16)[0]

    with pytest.raises(CheckpointError, match=rf"{re.escape(Q_PROJ)}\.bias: unexpected \(no place for it in a llama"):
        spec_of(rewritten(tmp_path, add))


def test_zero_padding_of_the_mlp_changes_nothing(tmp_path: Path) -> None:
    """As in the published files of Qwen2.5-72B: rows of down_proj, columns of gate_proj and up_proj of weight 0."""

    def pad(tensors: Tensors) -> None:
        for i in range(2):
            for name in ("gate_proj", "up_proj"):
                at = f"model.layers.{i}.mlp.{name}"
                zeros = decode_zeros(tensors[f"{at}.qzeros"], 4, 96, "gptq")
                # Zero points of 8 and integers of 8, so that s * (q - z) is 0.
                zeros = np.pad(np.asarray(zeros), ((0, 0), (0, 32)), constant_values=8)
                tensors[f"{at}.qzeros"] = np.asarray(encode_zeros(zeros, 4, "gptq"))
                words = np.full((8, 32), 0x88888888, np.uint32).view(np.int32)
                tensors[f"{at}.qweight"] = np.concatenate([tensors[f"{at}.qweight"], words], axis=1)
                tensors[f"{at}.scales"] = np.pad(tensors[f"{at}.scales"], ((0, 0), (0, 32)), constant_values=1)
            at = f"model.layers.{i}.mlp.down_proj"
            words = np.full((4, 64), 0x88888888, np.uint32).view(np.int32)
            tensors[f"{at}.qweight"] = np.concatenate([tensors[f"{at}.qweight"], words])
            more = np.asarray(encode_zeros(np.full((1, 64), 8), 4, "gptq"))
            tensors[f"{at}.qzeros"] = np.concatenate([tensors[f"{at}.qzeros"], more])
            tensors[f"{at}.scales"] = np.pad(tensors[f"{at}.scales"], ((0, 1), (0, 0)), constant_values=1)
            tensors[f"{at}.g_idx"] = np.arange(128, dtype=np.int32) // 32

    padded = load(rewritten(tmp_path, pad, intermediate_size=128))
    np.testing.assert_allclose(padded(IDS), np.load(PLAIN / "logits.npz")["logits_ref_fp32"], atol=1e-4)


HEAD = {"lm_head": True, "dynamic": {"lm_head": {"bits": 8, "group_size": 32}}}


def quantize_head(tensors: Tensors, like: str = "lm_head.weight") -> np.ndarray:
    """Replace lm_head by 8 bit in groups of 32; returns the dequantised head (out, in)."""
    head = tensors[like].astype(np.float32).T
    tensors.pop("lm_head.weight", None)
    groups = head.reshape(2, 32, -1)
    scales = np.maximum(np.abs(groups).max(axis=1) / 127, 1e-4).astype(np.float16)
    integers = np.clip(np.round(groups / scales[:, None].astype(np.float32)) + 128, 0, 255).reshape(head.shape)
    w = QuantizedWeight.from_gptq(
        pack(integers.astype(np.uint8), 8),
        encode_zeros(np.full(scales.shape, 128), 8, "gptq"),
        scales,
        bits=8,
        group_size=32,
    )
    tensors |= {f"lm_head.{part}": np.asarray(array) for part, array in w.to_gptq().items()}
    return np.asarray(w.dequantize()).T


def test_a_quantised_head(tmp_path: Path) -> None:
    """lm_head in 8 bit through ``dynamic``, against the same model with the dequantised head in float32."""
    kept: Tensors = {}

    def quantise(tensors: Tensors) -> None:
        kept["lm_head.weight"] = np.ascontiguousarray(quantize_head(tensors))

    model = load(rewritten(tmp_path, quantise, quantization=HEAD))
    assert model.lm_head.packed.bits == 8
    (tmp_path / "dense").mkdir()
    dense = load(rewritten(tmp_path / "dense", lambda tensors: tensors.update(kept)))
    assert not dense.lm_head.is_quantized
    np.testing.assert_allclose(model(IDS), dense(IDS), atol=1e-5)


def test_a_head_of_its_own_counts_though_the_config_says_tied(tmp_path: Path) -> None:
    source = CHECKPOINTS / "ckpt-qwen2-b4g32-sym-desc"
    tied = spec_of(source)
    assert tied.head is None

    def copy(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def other(tensors: Tensors) -> None:
        copy(tensors)
        tensors["lm_head.weight"][7, 3] += 1

    def quantise(tensors: Tensors) -> None:
        quantize_head(tensors, "model.embed_tokens.weight")

    for i, (change, own) in enumerate(((copy, False), (other, True), (quantise, True))):
        (tmp_path / str(i)).mkdir()
        spec = spec_of(rewritten(tmp_path / str(i), change, source, HEAD))
        assert (spec.head is not None) == own
    assert spec.head.quant.bits == 8


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def replace(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.__setitem__(name, np.ascontiguousarray(change(tensors[name])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{Q_PROJ}.qzeros"), f"{Q_PROJ}.qzeros: missing"),
        (drop(f"{Q_PROJ}.qweight"), f"{Q_PROJ}.weight: missing"),
        (drop("model.norm.weight"), "model.norm.weight: missing"),
        (drop("lm_head.weight"), "lm_head.weight: missing"),
        (drop("model.layers.1.input_layernorm.weight"), "model.layers.1.input_layernorm.weight: missing"),
        (replace(f"{Q_PROJ}.qweight", lambda a: a[:-1]), f"{Q_PROJ}.qweight: found shape (7, 64), expected (8, 64)"),
        (replace(f"{Q_PROJ}.qweight", lambda a: a.astype(np.int64)), f"{Q_PROJ}.qweight: found int64, expected int32"),
        (
            replace(f"{Q_PROJ}.qzeros", lambda a: a.astype(np.float32)),
            f"{Q_PROJ}.qzeros: found float32, expected int32",
        ),
        (replace(f"{Q_PROJ}.scales", lambda a: a[:1]), f"{Q_PROJ}.scales: found shape (1, 64), expected (2, 64)"),
        (
            replace(f"{Q_PROJ}.scales", lambda a: a.astype(np.int32)),
            f"{Q_PROJ}.scales: found int32, expected float16 or bfloat16 or float32",
        ),
        (replace(f"{Q_PROJ}.g_idx", lambda a: a[:5]), f"{Q_PROJ}.g_idx: found shape (5,), expected (64,)"),
        (replace("model.embed_tokens.weight", lambda a: a[:100]), "model.embed_tokens.weight: found shape (100, 64)"),
        (lambda t: t.update(extra=np.ones(3)), "extra: unexpected (no place for it in a llama decoder)"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.qweight": np.ones((8, 96), np.int32)}),
            "model.layers.2.mlp.up_proj.qweight: unexpected",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, change: Callable[[Tensors], Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        spec_of(rewritten(tmp_path, change))


def test_all_problems_are_reported_at_once_up_to_twenty(tmp_path: Path) -> None:
    """A group size that is not the file's: every quantised tensor is of the wrong shape."""
    with pytest.raises(
        CheckpointError, match=r"28 tensors do not fit the config(?s:.)*and 8 more\nCheck that config"
    ) as e:
        spec_of(rewritten(tmp_path, quantization={"group_size": 16}))
    assert str(e.value).count("found shape") == 20


def test_wrong_bits_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(Q_PROJ)}\.qweight: found shape \(8, 64\), expected \(16, 64\)"
    ):
        spec_of(rewritten(tmp_path, quantization={"bits": 8}))


def test_a_packed_module_that_the_config_leaves_in_16_bit_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.qweight: the quantisation config does not say"
    ):
        spec_of(rewritten(tmp_path, quantization={"dynamic": {r"-:.*up_proj": {}}}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers_are_found_at_their_place(tmp_path: Path, value: float) -> None:
    def spoil(scales: np.ndarray) -> np.ndarray:
        scales[1, 5] = value
        return scales

    folder = rewritten(tmp_path, replace(f"{Q_PROJ}.scales", spoil))
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(Q_PROJ)}\.scales: 1 of 128 scales .* the first at \(1, 5\)"
    ):
        load(folder)


@pytest.mark.parametrize("group", [2, -1])
def test_a_group_index_out_of_range_is_named(tmp_path: Path, group: int) -> None:
    def spoil(g_idx: np.ndarray) -> np.ndarray:
        g_idx[10] = group
        return g_idx

    folder = rewritten(tmp_path, replace(f"{Q_PROJ}.g_idx", spoil))
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(Q_PROJ)}\.g_idx: groups run from -?\d to \d, expected 0 to 1"
    ):
        load(folder)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_scales_and_embeddings_of_other_float_types(tmp_path: Path, dtype: Any) -> None:
    def retype(tensors: Tensors) -> None:
        for name, array in tensors.items():
            if array.dtype == np.float16:
                tensors[name] = array.astype(dtype)

    model = load(rewritten(tmp_path, retype))
    assert model.embed_tokens.weight.get_value().dtype == dtype
    assert next(linears(model))[1].packed.scales.dtype == dtype
    if dtype == np.float32:  # widening changes no value
        np.testing.assert_array_equal(model(IDS), load(PLAIN)(IDS))


def test_norms_of_several_types_are_held_in_one_that_fits_all(tmp_path: Path) -> None:
    def widen(norm: np.ndarray) -> np.ndarray:
        return norm.astype(np.float32) + np.float32(1e-6)

    name = "model.layers.1.input_layernorm.weight"
    folder = rewritten(tmp_path, replace(name, widen))
    held = load(folder).segments[0].input_layernorm.weight.get_value()
    np.testing.assert_array_equal(held[1], load_file(folder / "model.safetensors")[name])


def test_layers_of_different_kinds_run_in_segments() -> None:
    """16-bit and 8-bit modules through ``dynamic``: two runs, each with its own stack."""
    spec = spec_of(CHECKPOINTS / "ckpt-llama-b4g32-sym-dynamic")
    assert list(spec.runs()) == [(0, 1), (1, 1)]
    first, second = (dict(layer) for layer in spec.layers)
    assert first["mlp.up_proj"].quant is None
    assert (second["mlp.up_proj"].quant.bits, second["mlp.down_proj"].quant.bits) == (4, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
    ],
)
def test_an_unsupported_model_is_refused_before_its_tensors_are_read(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(rewritten(tmp_path, **config))
