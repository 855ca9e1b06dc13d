"""16-bit folder -> GPTQ folder: every layer is what GPTQ gives for the inputs that transformers' forward pass makes."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import convert
import convert.block
import convert.hf
import convert.quantize
import lotaqaf_jax
from convert.__main__ import main
from convert.block import STAGES, Stream
from convert.quantize import LOG
from lotaqaf_jax.errors import CheckpointError, ConfigError, DataError
from lotaqaf_jax.models import PROJECTIONS, DecoderConfig
from lotaqaf_jax.models.decoder import Block, causal
from lotaqaf_jax.models.loading import load_block
from lotaqaf_jax.models.rope import rope_angles
from lotaqaf_jax.models.spec import dense_spec
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.quant.folder import INDEX, CheckpointFolder
from lotaqaf_jax.quant.gptq import quantize_layer
from tests.convert.dense import LLAMA, QWEN, SIZES, write_model
from tests.convert.making import checkpoint


def samples(count: int = 10, seed: int = 0) -> list[np.ndarray]:
    """Random tokens, samples of different lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 300, rng.integers(20, 40)).astype(np.int32) for _ in range(count)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "llama", LLAMA)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "qwen", QWEN, jnp.bfloat16)


@pytest.fixture(scope="module")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    convert.quantize(llama, folder, calibration=samples(), group_size=32, progress=False)
    return folder


def weight_of(folder: CheckpointFolder, name: str) -> QuantizedWeight:
    """A module as the reader of GPTQ files decodes it."""
    assert folder.quantization is not None
    how = folder.quantization.for_module(name)
    assert how is not None
    arrays = (folder.read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx"))
    form = folder.quantization.checkpoint_format
    return QuantizedWeight.from_gptq(
        *arrays, bits=how.bits, group_size=how.group_size, checkpoint_format=form, name=name
    )


class Torch:
    """The model in transformers, in float32, from which inputs are taken and in which weights are replaced."""

    def __init__(self, folder: Path) -> None:
        torch = pytest.importorskip("torch")
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.modules = dict(self.model.named_modules())

    def hessian(self, name: str, ids: list[np.ndarray]) -> np.ndarray:
        """2/rows * x^T x in float64, with x what the module ``name`` is given."""
        seen: list[np.ndarray] = []
        hook = self.modules[name].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].numpy()))
        with self.torch.no_grad():
            for sample in ids:
                self.model(self.torch.from_numpy(sample[None].astype(np.int64)))
        hook.remove()
        x = np.concatenate(seen).astype(np.float64)
        return 2 / len(x) * x.T @ x

    def weight(self, name: str) -> np.ndarray:
        """(in, out)."""
        return self.modules[name].weight.detach().numpy().T

    def replace(self, name: str, weight: QuantizedWeight) -> None:
        self.modules[name].weight.data = self.torch.from_numpy(np.asarray(weight.dequantize()).T.copy())


CASES = [
    # model, bits, group_size, sym, desc_act, act_group_aware, damp_percent, grid_search
    ("llama", 3, 32, False, False, True, 0.05, True),
    ("qwen", 4, 16, False, True, True, 0.01, False),
    ("qwen", 8, -1, True, True, False, 0.05, True),
    ("qwen", 2, 32, False, False, False, 0.1, False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-b{case[1]}g{case[2]}")
def test_every_layer_is_what_its_own_inputs_give(
    case: tuple[Any, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The whole model against the function for one layer, with inputs from transformers' forward pass.

    Stage by stage, transformers' model gets the weights that were written, so that it gives the inputs of the next.
    """
    name, *values = case
    keys = ("bits", "group_size", "sym", "desc_act", "act_group_aware", "damp_percent", "grid_search")
    options = dict(zip(keys, values, strict=True))
    group_size = options["group_size"]
    dense, ids = request.getfixturevalue(name), samples()
    report = convert.quantize(dense, tmp_path / "out", calibration=ids, progress=False, **options)
    written, theirs, untouched = CheckpointFolder(tmp_path / "out"), Torch(dense), Torch(dense)
    agreement, elsewhere = [], []
    errors = {layer.name: layer for layer in report.layers}
    for index, stage in itertools.product(range(theirs.model.config.num_hidden_layers), STAGES):
        names = [f"model.layers.{index}.{path}" for path in stage]
        hessian = theirs.hessian(names[0], ids)
        found = {module: weight_of(written, module) for module in names}
        for module, weight in found.items():
            expected = quantize_layer(theirs.weight(module), hessian, **options)
            groups = np.arange(weight.shape[0]) // (weight.shape[0] if group_size == -1 else group_size)
            g_idx = groups if weight.g_idx is None else weight.g_idx
            np.testing.assert_array_equal(g_idx, expected.g_idx)
            same = (np.asarray(weight.integers()) == np.asarray(expected.integers)).all(axis=0)
            same &= (np.asarray(weight.scales) == np.asarray(expected.scales)).all(axis=0)
            same &= (np.asarray(weight.zeros) == np.asarray(expected.zeros)).all(axis=0)
            agreement.append(same.mean())
            other = quantize_layer(theirs.weight(module), untouched.hessian(names[0], ids), **options)
            elsewhere.append((np.asarray(weight.integers()) == np.asarray(other.integers)).all(axis=0).mean())
            # The objective as reported, from what was written.
            e = theirs.weight(module) - np.asarray(weight.dequantize(), np.float64)
            loss, whole = (np.einsum("ij,ik,kj", m, hessian, m, optimize=True) for m in (e, theirs.weight(module)))
            np.testing.assert_allclose(errors[module].loss, loss, rtol=2e-2, atol=1e-6)
            np.testing.assert_allclose(errors[module].error, loss / whole, rtol=2e-2, atol=1e-6)
        for module, weight in found.items():
            theirs.replace(module, weight)
    # A column that hangs on the last bit may turn the other way; the inputs of an unquantised model give others.
    assert np.mean(agreement) > 0.97
    assert min(agreement) > 0.8
    assert np.mean(elsewhere) < np.mean(agreement) - 0.1


def test_the_result_loads_and_computes_what_was_written(llama: Path, quantized: Path) -> None:
    """Against transformers with the dequantised weights in place of the 16-bit ones."""
    torch = pytest.importorskip("torch")
    written, theirs = CheckpointFolder(quantized), Torch(llama)
    for index, path in itertools.product(range(2), PROJECTIONS):
        name = f"model.layers.{index}.{path}"
        theirs.replace(name, weight_of(written, name))
    ids = np.random.default_rng(3).integers(0, 300, (2, 12), dtype=np.int32)
    model = lotaqaf_jax.load_pretrained(quantized, dtype=jnp.float32, progress=False)
    with torch.no_grad():
        expected = theirs.model(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(model(ids), expected, rtol=1e-3, atol=1e-3)
    dense = lotaqaf_jax.load_pretrained(llama, dtype=jnp.float32, progress=False)
    assert np.abs(np.asarray(dense(ids)) - expected).max() > 0.05


def test_everything_else_is_kept(llama: Path, quantized: Path) -> None:
    before, after = CheckpointFolder(llama), CheckpointFolder(quantized)
    kept = before.tensors.keys() & after.tensors.keys()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= kept
    assert "model.layers.0.mlp.down_proj.bias" in kept
    for name in kept:
        assert before.tensors[name].dtype == after.tensors[name].dtype
        np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (quantized / name).read_bytes() == (llama / name).read_bytes()
    assert {k: v for k, v in after.config.items() if k != "quantization_config"} == before.config
    assert json.loads((quantized / "quantize_config.json").read_text()) == after.config["quantization_config"]


def test_shards_stay_and_the_index_names_every_tensor(qwen: Path, tmp_path: Path) -> None:
    """Also tensors of no use, which some writers leave, and a copy of the tied head."""
    sharded = tmp_path / "sharded"
    shutil.copytree(qwen, sharded)
    (sharded / "model.safetensors").unlink()
    tensors = load_file(qwen / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    files = ("a.safetensors", "b.safetensors")
    where = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: array for name, array in tensors.items() if where[name] == file}, sharded / file)
    (sharded / INDEX).write_text(json.dumps({"weight_map": where}))
    convert.quantize(sharded, tmp_path / "out", calibration=samples(4), group_size=16, sym=True, progress=False)
    out = CheckpointFolder(tmp_path / "out")
    assert {entry.file.name for entry in out.tensors.values()} == set(files)
    for name, entry in out.tensors.items():
        module, _, part = name.rpartition(".")
        source = f"{module}.weight" if part in ("qweight", "qzeros", "scales", "g_idx") else name
        assert entry.file.name == where[source]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == out.nbytes
    assert index["weight_map"] == {name: entry.file.name for name, entry in out.tensors.items()}
    for name in ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        np.testing.assert_array_equal(out.read(name), tensors[name])
    assert out.read("model.norm.weight").dtype == ml_dtypes.bfloat16
    lotaqaf_jax.load_pretrained(tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("sym", "asked", "form", "writers"),
    [
        (True, {}, "gptq", 1),
        (False, {}, "gptq", 2),
        (False, {"checkpoint_format": "gptq_v2"}, "gptq_v2", 1),
        (True, {"checkpoint_format": "gptq_v2"}, "gptq_v2", 1),
    ],
)
def test_formats_hold_the_same_weights(
    qwen: Path, tmp_path: Path, sym: bool, asked: dict[str, str], form: str, writers: int
) -> None:
    options: dict[str, Any] = {"calibration": samples(4), "bits": 4, "group_size": 16, "sym": sym, "progress": False}
    convert.quantize(qwen, tmp_path / "one", **asked, **options)
    convert.quantize(qwen, tmp_path / "two", checkpoint_format="gptq_v2", **options)
    one, two = (CheckpointFolder(tmp_path / name) for name in ("one", "two"))
    said = one.config["quantization_config"]
    assert (said["checkpoint_format"], said["sym"], len(said["meta"]["quantizer"])) == (form, sym, writers)
    for index, path in itertools.product(range(2), PROJECTIONS):
        weights = [weight_of(folder, f"model.layers.{index}.{path}") for folder in (one, two)]
        np.testing.assert_array_equal(weights[0].dequantize(), weights[1].dequantize())
        assert not sym or (np.asarray(weights[0].zeros) == 8).all()
    for runtime, loads in {"sglang": form == "gptq", "transformers": True, "gptqmodel": True}.items():
        verdict = convert.check_runtime(tmp_path / "one", runtime)
        assert verdict.loads == loads, verdict.reasons


def test_padding_and_chunks_change_nothing(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of different lengths, many or one at a time: the same Hessians, so nearly the same columns."""
    folders = []
    for tokens in (4096, 1):
        monkeypatch.setattr(convert.block, "_CHUNK_TOKENS", tokens)
        folders.append(tmp_path / str(tokens))
        convert.quantize(qwen, folders[-1], calibration=samples(), group_size=16, progress=False)
    one, two = map(CheckpointFolder, folders)
    same = [(one.read(name) == two.read(name)).all(axis=0).mean() for name in one.tensors if name.endswith(".qweight")]
    assert np.mean(same) > 0.97


def test_activations_of_16_bits(qwen: Path, tmp_path: Path) -> None:
    """As on a card: the same layers, with errors that are nearly the same."""
    reports = []
    for dtype in (jnp.float32, jnp.bfloat16):
        out = tmp_path / jnp.dtype(dtype).name
        reports.append(convert.quantize(qwen, out, calibration=samples(), group_size=16, dtype=dtype, progress=False))
    errors = [np.array([layer.error for layer in report.layers]) for report in reports]
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.25)
    assert not np.array_equal(*errors)


def test_the_same_twice(qwen: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert.quantize(qwen, tmp_path / name, calibration=samples(4), group_size=16, progress=False)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_halves_of_a_block_are_the_block(llama: Path) -> None:
    folder = CheckpointFolder(llama)
    config = DecoderConfig.from_hf(folder.config)
    block = load_block(folder, config, 1, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 48)), jnp.float32)
    attend = causal(rope_angles(jnp.broadcast_to(jnp.arange(9), (2, 9)), config))
    whole, _ = block(x, attend)
    np.testing.assert_array_equal(block.mlp_half(block.attention_half(x, attend)), whole)


def test_what_is_on_the_device_does_not_grow_with_the_number_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most that lives when a layer is quantised: one block and the work on one layer."""
    most = {}
    real = convert.block.quantize_layer
    for layers in (1, 6):
        dense = write_model(tmp_path / f"dense{layers}", QWEN | {"num_hidden_layers": layers})
        before = sum(array.nbytes for array in jax.live_arrays())
        found = []

        def watched(*args: Any, found: list[int] = found, **options: Any) -> Any:
            found.append(sum(array.nbytes for array in jax.live_arrays()))
            return real(*args, **options)

        monkeypatch.setattr(convert.block, "quantize_layer", watched)
        convert.quantize(dense, tmp_path / f"out{layers}", calibration=samples(4), group_size=16, progress=False)
        assert len(found) == 7 * layers
        most[layers] = max(found) - before
    config = DecoderConfig.from_hf(SIZES | QWEN)
    shapes = nnx.eval_shape(lambda: Block(config, dict(dense_spec(config, jnp.float32).layers[0]), jnp.float32))
    block = sum(leaf.size * 4 for leaf in jax.tree.leaves(nnx.state(shapes)))
    assert block < most[1] <= block + 4 * 8 * 48 * 48
    assert most[6] <= 1.01 * most[1]


def test_the_stream_is_on_the_host_and_replaced_in_place(llama: Path) -> None:
    folder = CheckpointFolder(llama)
    config = DecoderConfig.from_hf(folder.config)
    ids = samples(5)
    stream = Stream.embedded(ids, folder.read("model.embed_tokens.weight"), jnp.float32)
    assert isinstance(stream.x, np.ndarray)
    assert stream.keep.sum() == sum(map(len, ids))
    x, place = stream.x.copy(), stream.x.ctypes.data
    block = load_block(folder, config, 0, jnp.float32)
    for part in ("self_attn", "mlp"):
        stream.advance(block, config, part)
    assert stream.x.ctypes.data == place
    attend = causal(rope_angles(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), config))
    expected, _ = block(jnp.asarray(x), attend)
    np.testing.assert_allclose(stream.x[stream.keep], np.asarray(expected)[stream.keep], rtol=1e-3, atol=1e-4)


def test_command(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} and some more words {i * i}"}) + "\n" for i in range(60)))
    out = str(tmp_path / "out")
    flags = ["--model", str(qwen), "--calibration", str(text), "--samples", "8", "--length", "32", "--bits", "3"]
    command = ["quantize", *flags, "--group_size", "16", "--desc_act", "--damp_percent", "0.1", "--seed", "3"]
    assert main([*command, "--output", out, "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "8 samples, 256 tokens" in shown
    assert "down_proj" in shown
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (said["bits"], said["group_size"], said["desc_act"], said["sym"]) == (3, 16, True, False)
    assert said["meta"]["damp_percent"] == 0.1
    log = json.loads((tmp_path / "out" / LOG).read_text())
    assert log["settings"]["seed"] == 3
    assert [layer["name"] for layer in log["layers"]] == [
        f"model.layers.{i}.{path}" for i in range(2) for path in PROJECTIONS
    ]
    assert all(0 < layer["error"] < 0.5 for layer in log["layers"])
    # The log tells of this folder alone and does not go with a copy of the model.
    convert.save_pretrained(lotaqaf_jax.load_pretrained(out, progress=False), tmp_path / "copy", base=out)
    assert not (tmp_path / "copy" / LOG).exists()


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], llama: Path) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("some text " * 200)

    def run(*flags: str, model: Path = llama, calibration: Path = text) -> str:
        output = ["--output", str(tmp_path / "out"), "--calibration", str(calibration), "--quiet"]
        assert main(["quantize", "--model", str(model), "--length", "32", *output, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "Traceback" not in error
        assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
        return error

    return run


def test_bad_input_is_one_sentence_and_leaves_nothing(
    refused: Any, llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    short = tmp_path_factory.mktemp("text") / "short.txt"
    short.write_text("some text")
    assert "--bits: 5 is not a supported width" in refused("--bits", "5")
    assert "--group_size: found 0" in refused("--group_size", "0")
    assert "--damp_percent: found -1.0" in refused("--damp_percent", "-1")
    assert "'gptq_p'" in refused("--checkpoint_format", "gptq_p")
    assert "--length: found 65, the model has 64 positions" in refused("--length", "65")
    assert "fewer than one sample" in refused(calibration=short)
    assert "is not a file" in refused(calibration=tmp_path / "none.jsonl")
    assert "is, holds or lies in" in refused("--output", str(llama / "out"))
    packed = checkpoint("ckpt-llama-b4g32-asym-desc")
    assert packed is not None
    assert "is quantised already" in refused(model=packed)


def test_a_model_that_cannot_be_quantised_is_named(qwen: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(qwen, folder)
        tensors = {key: array.copy() for key, array in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    out = tmp_path / "out"
    nan = broken("nan", lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((0, 0), np.nan))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: the largest weight is nan"):
        convert.quantize(nan, out, calibration=samples(2), group_size=16, progress=False)
    missing = broken("missing", lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: missing"):
        convert.quantize(missing, out, calibration=samples(2), progress=False)
    with pytest.raises(DataError, match="no samples"):
        convert.quantize(qwen, out, calibration=[], progress=False)
    with pytest.raises(DataError, match="knows 0 to 299"):
        convert.quantize(qwen, out, calibration=[[300]], progress=False)
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_an_interrupt_leaves_what_was_there(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    calls = iter(range(100))
    real = convert.block.quantize_layer

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(convert.block, "quantize_layer", interrupted)
    with pytest.raises(ConfigError, match="not empty"):
        convert.quantize(qwen, out, calibration=samples(2), group_size=16, progress=False)
    with pytest.raises(KeyboardInterrupt):
        convert.quantize(qwen, out, calibration=samples(2), group_size=16, overwrite=True, progress=False)
    assert next(calls) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "{}"
