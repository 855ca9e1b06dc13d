"""A base of another format: trained, exported in that format, verified, imported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import convert
import lotaqaf_jax
from convert.__main__ import main
from lotaqaf_jax.errors import AdapterError, VerificationError
from lotaqaf_jax.models import Adapter, Decoder, adapted_linears, add_qalora
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model, checkpoint
from tests.models.tiny import set_random_low_rank
from tests.quant.formats.foreign import INTEGERS, awq_values, folder_of, unstream

KINDS = ("awq", "compressed-tensors", "mlx")
SOURCE = "ckpt-llamapos-b4g32-asym"
Q = "model.layers.0.self_attn.q_proj"
IDS = np.arange(16, dtype=np.int32)[None]

pytestmark = pytest.mark.filterwarnings("ignore:MLX's biases")


@pytest.fixture(params=KINDS)
def other(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointFolder:
    """The same numbers in every format, with tokenizer files."""
    source = checkpoint(SOURCE)
    assert source is not None
    folder = folder_of(request.param, source, tmp_path / "base")
    for path in (checkpoint("tokenizer") or Path()).glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    return CheckpointFolder(folder)


def values(kind: str, folder: Path, module: str) -> np.ndarray:
    """The integers of a module, (in, out), by the format's description."""
    words = load_file(folder / "model.safetensors")[f"{module}.{INTEGERS[kind]}"]
    return awq_values(words) if kind == "awq" else unstream(words, 4, words.shape[1] * 8).T


@pytest.mark.parametrize("offset", ["none", "reference"])
def test_merged_in_the_format_of_the_base(other: CheckpointFolder, offset: str, tmp_path: Path) -> None:
    """Only integers differ, each by one step at most; configs are the base's bytes; logits are the adapter model's."""
    model = adapter_model(other, offset=offset)
    merged = tmp_path / "merged"
    report = convert.merge_and_save(model, merged, base=other, progress=False)
    assert report.moved_share > 0.01
    assert (report.largest_move, report.tokens, report.bytes_after) == (1, 64, report.bytes_before)
    assert report.identical_tensors == len(other.stored) - len(other.quantized_modules)
    old, new = (np.fromfile(folder / "model.safetensors", np.uint8) for folder in (other.path, merged))
    allowed = np.zeros(len(old), bool)
    for module in other.quantized_modules:
        entry = other.stored[f"{module}.{INTEGERS[other.format]}"]
        allowed[entry.start : entry.stop] = True
    assert (old != new).any()
    assert not ((old != new) & ~allowed).any()
    for path in other.path.iterdir():
        if path.suffix != ".safetensors":
            assert (merged / path.name).read_bytes() == path.read_bytes()
    moves = [values(other.format, folder, Q) for folder in (merged, other.path)]
    moved = moves[0] - moves[1]
    assert set(np.unique(moved)) == {-1, 0, 1}
    assert (merged / "offset_adapter").is_dir() == (offset != "none")
    np.testing.assert_array_equal(convert.load_merged(merged, progress=False)(IDS), model(IDS))


def gradients(model: Decoder) -> list[np.ndarray]:
    """Of the adapters, A and B in turn."""
    graph, adapters, rest = nnx.split(model, Adapter, ...)

    def loss(adapters: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graph, adapters, rest)(IDS) ** 2)

    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapters)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.grad(loss)(floats))]


def test_trains_as_the_gptq_folder_does(other: CheckpointFolder) -> None:
    """The gradients of the adapters are those that the same numbers in GPTQ give."""
    source = checkpoint(SOURCE)
    assert source is not None
    expected = gradients(adapter_model(CheckpointFolder(source)))
    for ours, theirs in zip(gradients(adapter_model(other)), expected, strict=True):
        assert np.any(theirs)
        np.testing.assert_array_equal(ours, theirs)


def test_adapter_names_its_base(other: CheckpointFolder, tmp_path: Path) -> None:
    model = adapter_model(other)
    convert.save_adapter(model, tmp_path / "adapter", base=other, progress=False)
    out, base = str(tmp_path / "merged"), str(other.path)
    given = ["--model", base, "--adapter", str(tmp_path / "adapter"), "--quiet"]
    assert main(["merge", *given, "--output", out]) == 0
    assert main(["verify", *given, "--merged", out]) == 0
    merged = CheckpointFolder(out)
    unadapted = load_decoder(merged, jnp.float32, progress=False)
    with pytest.raises(AdapterError, match="another base"):
        convert.load_adapter(unadapted, tmp_path / "adapter", base=merged)


def test_qalora_moves_no_byte(other: CheckpointFolder, tmp_path: Path) -> None:
    model = add_qalora(load_decoder(other, jnp.float32, progress=False), rank=3)
    set_random_low_rank(model)
    report = convert.merge_and_save(model, tmp_path / "merged", base=other, progress=False)
    assert report.moved_share == 0
    old, new = ((folder / "model.safetensors").read_bytes() for folder in (other.path, tmp_path / "merged"))
    assert old == new


@pytest.mark.parametrize("which", ["integer", "scale", "config"])
def test_what_must_not_change_is_caught(other: CheckpointFolder, which: str, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    convert.merge_and_save(adapter_model(other, offset="none"), merged, base=other, progress=False)
    scales = {"awq": "scales", "compressed-tensors": "weight_scale", "mlx": "scales"}[other.format]
    name = f"{Q}.{INTEGERS[other.format] if which == 'integer' else scales}"
    message = rf"{name}: (an integer moved by \d+ steps|differs in)"
    if which == "config":
        (merged / "config.json").write_text((merged / "config.json").read_text() + "\n")
        message = r"config\.json: is not the file of the base"
    else:
        entry = CheckpointFolder(merged).stored[name]
        array = np.memmap(entry.file, np.uint8, "r+", entry.start, (4,))
        array[:] = array ^ 0x88
        array.flush()
    with pytest.raises(VerificationError, match=message):
        convert.verify(other, merged, progress=False)


def test_import_then_export_gives_gptq(other: CheckpointFolder, tmp_path: Path) -> None:
    """The imported state has GPTQ's words, and its config says nothing of the format that they were in."""
    imported, out = tmp_path / "imported", tmp_path / "out"
    assert main(["import", "--model", str(other.path), "--output", str(imported), "--quiet"]) == 0
    assert not {"quantization", "quantization_config"} & json.loads((imported / "config.json").read_text()).keys()
    assert main(["export", "--model", str(imported), "--output", str(out), "--quiet"]) == 0
    written = CheckpointFolder(out)
    assert written.format == "gptq"
    for name in other.tensors:
        np.testing.assert_array_equal(written.read(name), other.read(name), err_msg=name)
    assert (out / "tokenizer.json").read_bytes() == (other.path / "tokenizer.json").read_bytes()


def test_scales_of_either_sign() -> None:
    """A grid that runs the other way holds the same weights; adapters with B negated make the same model of it."""
    source = checkpoint(SOURCE)
    assert source is not None
    plain = adapter_model(CheckpointFolder(source))
    mirrored = _mirrored(plain)
    np.testing.assert_array_equal(mirrored(IDS), plain(IDS))
    np.testing.assert_array_equal(lotaqaf_jax.merge(mirrored)(IDS), plain(IDS))
    for i, (ours, theirs) in enumerate(zip(gradients(mirrored), gradients(plain), strict=True)):
        assert np.any(theirs)
        np.testing.assert_array_equal(ours, theirs if i % 2 == 0 else -theirs)


def _mirrored(model: Decoder) -> Decoder:
    """q -> 15 - q, z -> 15 - z, scale -> -scale, B -> -B."""
    model = nnx.merge(*nnx.split(model), copy=True)
    for _, linear, pair in adapted_linears(model):
        weight = linear.packed
        linear.weight.set_value(
            dataclasses.replace(
                weight, qweight=~weight.qweight, zeros=jnp.uint8(15) - weight.zeros, scales=-weight.scales
            )
        )
        linear.set_adapters(dataclasses.replace(pair, b=-pair.b))
    return model
