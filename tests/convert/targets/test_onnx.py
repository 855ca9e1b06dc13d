"""Target onnx: the file's weights, read by a decoder written here from the operator; the graph, by ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import convert
import convert.targets.onnx
from convert.targets.host import HostWeight
from convert.targets.onnx_graph import FILES
from convert.targets.onnx_matrix import matrix
from convert.targets.target import EXACT, Source
from convert.tensors import named_linears, quantized_weights
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, QuantSpec, merge
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.quant.weight import group_length, trivial_g_idx
from tests.convert.making import adapter_model, checkpoint
from tests.convert.targets.gguf_making import LLAMA3, config, merged, tokenizer_folder
from tests.convert.targets.test_targets import steps_off, stream
from tests.models.test_loading import HEAD, load, quantize_head, rewritten
from tests.models.tiny import quantized_decoder

SCALED = LLAMA3 | {"original_max_position_embeddings": 32}  # so that 24 tokens show it
CHECKPOINTS = {
    "act-order": "ckpt-llama-b4g32-asym-desc",
    "dense layers": "ckpt-llama-b4g32-sym-dynamic",
    "part of a group": "ckpt-qwen2-b8g64-sym-partial",
}
TIED, SCALES = {"tie_word_embeddings": True}, {"rope_parameters": {"rope_theta": 100.0} | SCALED, "head_dim": 32}
BIASES = {"attention_bias": True, "mlp_bias": True}
MADE: dict[str, tuple[dict[str, Any], QuantSpec]] = {
    "qwen2, tied, 2 bit": ({"model_type": "qwen2"} | TIED, QuantSpec(2, 32)),
    "llama, 3 bit, scaled frequencies": (SCALES, QuantSpec(3, 16)),
    "llama, tied, 4 bit, one group, biases": (TIED | BIASES, QuantSpec(4, -1)),
    "qwen2, 8 bit, act-order": ({"model_type": "qwen2"}, QuantSpec(8, 64, act_order=True)),
}


@pytest.fixture
def _packages() -> None:
    for package in ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'lotaqaf_jax[onnx]'")


needs_packages = pytest.mark.usefixtures("_packages")


def made(name: str) -> tuple[Decoder, dict[str, Any]]:
    """A model with an offset, and where its tokenizer and config come from."""
    if name in CHECKPOINTS:
        path = checkpoint(CHECKPOINTS[name])
        assert path is not None
        base = CheckpointFolder(path)
        return merge(adapter_model(base)), {"base": base}
    changes, quant = MADE[name]
    model_type = changes.get("model_type", "llama")
    given = {key: value for key, value in changes.items() if key != "model_type"}
    return merged(config(model_type, **given), quant), {"tokenizer_from": tokenizer_folder()}


def save(model: Decoder, folder: Path, **options: Any) -> convert.ExportReport:
    given = {"tokenizer_from": tokenizer_folder()} if "base" not in options else {}
    return convert.save_pretrained(model, folder, target="onnx", progress=False, **given | options)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Every quantised weight (in, out) in float64, by its Hugging Face name, from what the file's operators mean."""
    import onnx

    graph = onnx.load(folder / FILES[0]).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = {}
    for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
        said = {attribute.name: attribute.i for attribute in node.attribute}
        bits, block, n_in, n_out = (said[key] for key in ("bits", "block_size", "K", "N"))
        assert said["accuracy_level"] == 1
        words, scales, zeros = (constants[name] for name in node.input[1:])
        blocks = -(-n_in // block)
        q = stream(words.reshape(n_out, -1), bits, blocks * block).astype(np.float64)
        z = stream(zeros.reshape(n_out, -1), bits, blocks).astype(np.float64)
        values = np.repeat(scales.reshape(n_out, blocks).astype(np.float64), block, axis=1)
        values = (values * (q - np.repeat(z, block, axis=1)))[:, :n_in].T
        for user in users[node.output[0]]:
            other = makers.get(next((name for name in user.input if name != node.output[0]), ""))
            if user.op_type == "Add" and other is not None and other.op_type == "MatMul":
                first = makers[other.input[0]]
                assert first.input[0] == node.input[0]
                sums, offsets = constants[first.input[1]], constants[other.input[1]]
                values = values + sums.astype(np.float64) @ offsets.astype(np.float64)
        maker = makers.get(node.input[0])
        if maker is not None and maker.op_type == "Gather" and maker.name.endswith("order/Gather"):
            values = values[np.argsort(constants[maker.input[1]])]
        name = node.name.removesuffix("/MatMulNBits")[1:].replace("/attn/", "/self_attn/").replace("/", ".")
        found[name] = values
    return found


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILES[0], providers=["CPUExecutionProvider"])
    said = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    given = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones(ids.shape, np.int64)}
    empty = np.zeros((len(ids), said["num_key_value_heads"], 0, said["head_size"]), np.float32)
    given |= {one.name: empty for one in session.get_inputs() if one.name.startswith("past_key_values")}
    return session.run(["logits"], given)[0]


@needs_packages
@pytest.mark.parametrize("name", [*MADE, *CHECKPOINTS])
def test_weights_and_logits_are_the_model_s(tmp_path: Path, name: str) -> None:
    model, options = made(name)
    folder = tmp_path / "out"
    report = save(model, folder, **options)
    written, expected = weights(folder), dict(quantized_weights(model))
    assert report.errors.keys() == written.keys() == expected.keys()
    assert report.exact
    assert any(weight.offset is not None and np.any(weight.offset) for weight in expected.values())
    for module, weight in expected.items():
        in_groups = dataclasses.replace(weight, group_size=group_length(weight.shape[0], weight.group_size))
        assert steps_off(in_groups, written[module]) <= EXACT
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)
    ours, theirs = np.asarray(model(ids)), logits(folder, ids)
    assert np.max(np.abs(ours - theirs)) <= 5e-5 * np.mean(np.abs(ours))


@needs_packages
def test_a_quantised_head_and_an_embedding_in_bfloat16(tmp_path: Path) -> None:
    model = load(rewritten(tmp_path, quantize_head, quantization=HEAD))
    embedding = model.embed_tokens.weight
    embedding.set_value(embedding.get_value().astype("bfloat16"))
    assert "lm_head" in save(model, tmp_path / "out").errors
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)
    ours = np.asarray(model(ids))
    assert np.max(np.abs(ours - logits(tmp_path / "out", ids))) <= 5e-5 * np.mean(np.abs(ours))


@needs_packages
def test_what_lies_beside_the_graph(tmp_path: Path) -> None:
    base, model = CheckpointFolder(checkpoint(CHECKPOINTS["act-order"]) or ""), made("act-order")[0]
    save(model, tmp_path / "alone", base=base)
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"README.md", "config.json", *FILES}
    said = json.loads((tmp_path / "alone" / "genai_config.json").read_text())["model"]
    assert said["eos_token_id"] == base.config["eos_token_id"]
    model, options = made("qwen2, tied, 2 bit")
    save(model, tmp_path / "out", **options)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tokenizer_folder() / file).read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    said = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (said["type"], said["vocab_size"], said["decoder"]["num_hidden_layers"]) == ("qwen2", 330, 2)
    assert "partial" not in (tmp_path / "out" / "model.onnx").read_bytes().decode(errors="ignore")


@needs_packages
@pytest.mark.parametrize("name", ["llama, tied, 4 bit, one group, biases", "act-order"])
def test_the_space_that_is_asked_for_is_what_is_taken(tmp_path: Path, name: str) -> None:
    model, options = made(name)
    save(model, tmp_path / "out", **options)
    taken = (tmp_path / "out" / "model.onnx.data").stat().st_size
    asked = convert.TARGETS["onnx"].size(model, Source(None, {}, None, ""))
    # The file aligns its tensors, which are tiny here.
    assert 0.8 * taken <= asked <= 1.05 * taken


@needs_packages
def test_the_file_is_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of the written words is turned over behind the writer's back."""
    import onnx

    def damaged(folder: Path, *arguments: Any) -> None:
        build_graph(folder, *arguments)
        tensors = onnx.load(folder / FILES[0], load_external_data=False).graph.initializer
        words = next(tensor for tensor in tensors if tensor.name.endswith("layers.1.mlp.up_proj.MatMulNBits.qweight"))
        start = int({entry.key: entry.value for entry in words.external_data}["offset"])
        with (folder / FILES[1]).open("r+b") as file:
            file.seek(start)
            byte = file.read(1)[0]
            file.seek(start)
            file.write(bytes([byte ^ 1]))

    build_graph = convert.targets.onnx.build_graph
    monkeypatch.setattr("convert.targets.onnx.build_graph", damaged)
    model, options = made("llama, 3 bit, scaled frequencies")
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj would be off by up to 1\.0000 steps"):
        save(model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@needs_packages
def test_what_the_builder_does_not_take_is_refused(tmp_path: Path) -> None:
    model = quantized_decoder(config("qwen2", rope_parameters={"rope_theta": 5e5} | SCALED), QuantSpec(4, 32))
    with pytest.raises(ConfigError, match="does not take this model: The llama3 RoPE"):
        save(model, tmp_path / "out")
    model = quantized_decoder(config("qwen2"), QuantSpec(4, 32))
    with pytest.raises(ConfigError, match=r"eos_token_id.*Put what it misses into config\.json"):
        save(model, tmp_path / "out", tokenizer_from=None)
    assert list(tmp_path.iterdir()) == []


@needs_packages
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_scales_beyond_all_range_are_refused(tmp_path: Path) -> None:
    model = quantized_decoder(config(), QuantSpec(4, 32))
    _, linear, _ = next(named_linears(model))
    linear.weight.set_value(dataclasses.replace(linear.packed, scales=jnp.full_like(linear.packed.scales, jnp.inf)))
    with pytest.raises(ConfigError, match="beyond its range"):
        save(model, tmp_path / "out", allow_lossy=True)
    assert list(tmp_path.iterdir()) == []


@needs_packages
def test_groups_below_a_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="groups of 8 rows, it holds 16, 32, 64"):
        save(quantized_decoder(config(), QuantSpec(4, 8)), tmp_path / "out")
    odd = quantized_decoder(config(intermediate_size=72), QuantSpec(4, -1))
    with pytest.raises(
        ConfigError, match=r"72 inputs in one group, it holds multiples of 16 \(model\.layers\.0\.mlp\.down_proj"
    ):
        save(odd, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnxruntime_genai", "onnx_ir", "torch"])
def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in ("onnx_ir", "torch", "onnxruntime_genai.models"):
        # Those asked for before it are there, whether they are installed or not.
        if name not in sys.modules and package not in name:
            monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnxruntime_genai":
        monkeypatch.setitem(sys.modules, "onnxruntime_genai.models", None)
    model = quantized_decoder(config(), QuantSpec(4, 32))
    with pytest.raises(ConfigError, match=rf"{package}.* is not installed; pip install 'lotaqaf_jax\[onnx\]'"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@needs_packages
def test_another_version_of_the_builder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime_genai.__version__", "0.19.1")
    with pytest.raises(ConfigError, match=r"found onnxruntime-genai 0\.19\.1, expected 0\.18"):
        save(quantized_decoder(config(), QuantSpec(4, 32)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def random_weight(bits: int, rows: int, group_size: int, order: bool) -> HostWeight:
    rng = np.random.default_rng(0)
    length = group_length(rows, group_size)
    g_idx = trivial_g_idx(rows, group_size)
    groups = int(g_idx[-1]) + 1
    return HostWeight(
        integers=rng.integers(0, 2**bits, (rows, 40)).astype(np.uint8),
        scales=rng.uniform(0.001, 0.1, (groups, 40)).astype(np.float16),
        zeros=rng.integers(0, 2**bits, (groups, 40)).astype(np.uint8),
        offset=rng.normal(0, 0.3, (groups, 40)).astype(np.float32),
        g_idx=rng.permutation(g_idx) if order else g_idx,
        bits=bits,
        group_size=length,
    )


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "block"), [(2, 64, 64), (3, 48, 16), (4, 16, 16), (8, -1, 32), (4, 512, 256)]
)
def test_a_matrix_holds_a_weight(bits: int, group_size: int, block: int, order: bool) -> None:
    weight = random_weight(bits, 1056 if group_size == 512 else 96, group_size, order)
    found = matrix(weight)
    assert found is not None
    assert (found.block, found.bits) == (block, 4 if bits == 3 else bits)
    assert (found.order is not None) == (order and group_size != -1)
    step = weight.spread(weight.scales.astype(np.float64))
    assert np.max(np.abs(found.values() - weight.values()) / step) <= EXACT
    part = found.columns(8, 24).values()
    np.testing.assert_array_equal(part, found.values()[:, 8:24])


def test_a_matrix_without_an_offset_is_exact_and_has_nothing_beside() -> None:
    weight = random_weight(4, 96, 32, order=False)
    found = matrix(dataclasses.replace(weight, offset=np.zeros_like(weight.offset)))
    assert found is not None
    assert found.order is found.sums is found.offsets is None
    np.testing.assert_array_equal(found.values(), dataclasses.replace(weight, offset=weight.offset * 0).values())


def test_scattered_groups_that_are_not_of_one_length_have_no_place() -> None:
    weight = random_weight(4, 96, 32, order=True)
    g_idx = weight.g_idx.copy()
    g_idx[np.flatnonzero(g_idx == 0)[0]] = 1
    assert matrix(dataclasses.replace(weight, g_idx=g_idx)) is None
