"""Every target holds the model that goes in: read by decoders written here from the formats, and by our own loader."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import convert
import lotaqaf_jax
from convert.targets.target import EXACT, table_row
from convert.tensors import named_linears, quantized_weights
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, QuantSpec, merge
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model, checkpoint
from tests.models.tiny import CONFIG, quantized_decoder
from tests.peer import torch_model

# By bits; plain group order.
BASES = {4: "ckpt-llamapos-b4g32-asym", 3: "ckpt-llamapos-b3g32-asym"}
CONFIG_64 = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=128, head_dim=16)
ACT_ORDER, PARTIAL = "ckpt-llama-b4g32-asym-desc", "ckpt-qwen2-b8g64-sym-partial"


@functools.cache
def merged(name: str, offset: str) -> tuple[CheckpointFolder, Decoder]:
    """A base, and a model with moved integers and the offset of that rule."""
    path = checkpoint(name)
    assert path is not None
    base = CheckpointFolder(path)
    return base, merge(adapter_model(base, offset=offset))


def exact(weight: QuantizedWeight) -> np.ndarray:
    """W (in, out) in float64, by the formula of QuantizedWeight."""
    g = np.arange(weight.shape[0]) // weight.group_size if weight.g_idx is None else np.asarray(weight.g_idx)
    mu = 0.0 if weight.offset is None else np.asarray(weight.offset, np.float64)
    shift = mu - np.asarray(weight.zeros, np.float64)
    return np.asarray(weight.scales, np.float64)[g] * (np.asarray(weight.integers()) + shift[g])


def steps_off(weight: QuantizedWeight, values: np.ndarray) -> float:
    """The largest error in steps."""
    g = np.arange(weight.shape[0]) // weight.group_size if weight.g_idx is None else np.asarray(weight.g_idx)
    return float(np.max(np.abs(values - exact(weight)) / np.asarray(weight.scales, np.float64)[g]))


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Values of ``bits`` bits from the little-endian bits of 32-bit words, along the last axis."""
    flat = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return flat[..., : count * bits].reshape(*flat.shape[:-1], count, bits) @ (1 << np.arange(bits))


def read_mlx(tensors: dict[str, np.ndarray], name: str, said: dict[str, Any], n_in: int) -> np.ndarray:
    q = stream(tensors[f"{name}.weight"], said["bits"], n_in).astype(np.float64)
    groups = (len(q), -1, said["group_size"])
    scales, biases = (tensors[f"{name}.{part}"].astype(np.float64)[..., None] for part in ("scales", "biases"))
    return (scales * q.reshape(groups) + biases).reshape(len(q), n_in).T


def read_awq(tensors: dict[str, np.ndarray], name: str, said: dict[str, Any], n_in: int) -> np.ndarray:
    def eights(words: np.ndarray) -> np.ndarray:
        nibbles = stream(words[..., None], 4, 8)
        return nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1).astype(np.float64)

    q, z = eights(tensors[f"{name}.qweight"]), eights(tensors[f"{name}.qzeros"])
    g = np.arange(n_in) // said["group_size"]
    return tensors[f"{name}.scales"].astype(np.float64)[g] * (q - z[g])


READERS = {"mlx": ("quantization", read_mlx), "awq": ("quantization_config", read_awq)}


@functools.lru_cache(maxsize=1)
def written_weights(folder: Path) -> dict[str, QuantizedWeight]:
    """Those of a GPTQ folder, with its offsets."""
    return dict(quantized_weights(convert.load_merged(folder, progress=False)))


def read(folder: Path, target: str, weight: QuantizedWeight, name: str) -> np.ndarray:
    """(in, out) float64 of a written weight."""
    if target in READERS:
        key, reader = READERS[target]
        said = json.loads((folder / "config.json").read_text())[key]
        return reader(load_file(folder / "model.safetensors"), name, said, weight.shape[0])
    if target == "hf16":
        return load_file(folder / "model.safetensors")[f"{name}.weight"].T.astype(np.float64)
    return exact(written_weights(folder)[name])


@pytest.mark.parametrize(
    ("bits", "target"),
    [(4, "awq"), *((bits, target) for bits in (4, 3) for target in ("gptq", "gptq8", "mlx", "hf16"))],
)
@pytest.mark.parametrize("offset", ["none", "reference"])
def test_a_target_holds_every_weight_and_says_how_far_it_is_off(
    tmp_path: Path, bits: int, offset: str, target: str
) -> None:
    base, model = merged(BASES[bits], offset)
    folder = tmp_path / "out"
    report = convert.save_pretrained(model, folder, base=base, target=target, allow_lossy=True, progress=False)
    found = {name: steps_off(weight, read(folder, target, weight, name)) for name, weight in quantized_weights(model)}
    assert report.errors.keys() == found.keys()
    for name, error in found.items():
        assert report.errors[name] == pytest.approx(error, abs=EXACT)
    bound = {"gptq8": 1 / {4: 16, 3: 32}[bits], "awq": 0.5, "hf16": 2.0**-11 * 2**bits}.get(target, EXACT)
    exactly = target in ("gptq", "mlx") or (offset == "none" and target != "hf16")
    assert report.exact == exactly
    assert report.largest[1] <= (EXACT if exactly else bound)


def test_all_else_is_the_model_s(tmp_path: Path) -> None:
    base, model = merged(BASES[4], "none")
    for target in ("gptq8", "mlx", "awq", "hf16"):
        folder = tmp_path / target
        convert.save_pretrained(model, folder, base=base, target=target, allow_lossy=True, progress=False)
        written = load_file(folder / "model.safetensors")
        quantised = tuple(f"{name}." for name, _ in quantized_weights(model))
        dense = [name for name in base.tensors if not name.startswith(quantised) or name.endswith(".bias")]
        assert set(dense) <= set(written)
        assert all(np.array_equal(written[name], base.read(name)) for name in dense)
        assert not [name for name in written if name not in dense and not name.startswith(quantised)]


def test_two_bits_and_groups_of_64(tmp_path: Path) -> None:
    model = quantized_decoder(CONFIG_64, QuantSpec(2, 64))
    for target in ("mlx", "gptq8"):
        folder = tmp_path / target
        assert convert.save_pretrained(model, folder, target=target, progress=False).exact
        for name, weight in quantized_weights(model):
            assert steps_off(weight, read(folder, target, weight, name)) <= EXACT


def test_act_order_goes_into_8_bits_and_16(tmp_path: Path) -> None:
    base, model = merged(ACT_ORDER, "none")
    ids = np.arange(24, dtype=np.int32)[None]
    folder = tmp_path / "gptq8"
    assert convert.save_pretrained(model, folder, base=base, target="gptq8", progress=False).exact
    # The same weights, so the same logits, on the same path.
    np.testing.assert_array_equal(load_decoder(CheckpointFolder(folder), jnp.float32, progress=False)(ids), model(ids))
    convert.save_pretrained(model, tmp_path / "hf16", base=base, target="hf16", allow_lossy=True, progress=False)
    dense = load_decoder(CheckpointFolder(tmp_path / "hf16"), jnp.float32, progress=False)
    np.testing.assert_allclose(dense(ids), model(ids), atol=2e-2)


def test_what_would_be_lost_is_refused_and_nothing_written(tmp_path: Path) -> None:
    base, model = merged(BASES[4], "reference")
    for target in ("gptq8", "awq", "hf16"):
        with pytest.raises(ConfigError, match=r"steps of its grid .*--allow-lossy .*gptq, mlx"):
            convert.save_pretrained(model, tmp_path / target, base=base, target=target, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_16_bits_are_refused_whatever_is_allowed(tmp_path: Path) -> None:
    model = quantized_decoder(CONFIG_64, QuantSpec(4, 32))
    _, linear, _ = next(named_linears(model))
    large = jnp.full(linear.packed.scales.shape, 60000, jnp.float16)
    linear.weight.set_value(dataclasses.replace(linear.packed, scales=large))
    with pytest.raises(ConfigError, match="beyond its range"):
        convert.save_pretrained(model, tmp_path / "out", target="hf16", allow_lossy=True, progress=False)


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        (ACT_ORDER, "mlx", "act-order"),
        (ACT_ORDER, "awq", "act-order"),
        (PARTIAL, "awq", "8 bit, it holds 4"),
        (PARTIAL, "gptq8", "8 bit, it holds 2, 3, 4"),
        (PARTIAL, "mlx", "96 inputs, it holds whole groups of 64"),
    ],
)
def test_a_model_that_a_target_has_no_room_for(tmp_path: Path, name: str, target: str, why: str) -> None:
    base, model = merged(name, "none")
    with pytest.raises(ConfigError, match=rf"--target {target}: the model has .*{why}"):
        convert.save_pretrained(model, tmp_path / "out", base=base, target=target, progress=False)


@pytest.mark.filterwarnings("ignore:.*not applied:UserWarning")
def test_the_offset_alone(tmp_path: Path) -> None:
    """What lies beside the whole model, padded to one rank, in a file that has no other beside it; PEFT applies it."""
    base, model = merged(ACT_ORDER, "reference")
    report = convert.save_pretrained(model, tmp_path / "lora", base=base, target="peft", progress=False)
    assert report.exact
    whole = tmp_path / "whole"
    convert.save_pretrained(model, whole, base=base, progress=False)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    rank = json.loads((whole / "offset_adapter" / "adapter_config.json").read_text())["r"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (rank, rank, {}, {})
    assert [path.name for path in (tmp_path / "lora").glob("*.safetensors")] == ["adapter_model.safetensors"]
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    narrow = load_file(whole / "offset_adapter" / "adapter_model.safetensors")
    assert found.keys() == narrow.keys()
    padded = 0
    for name, held in narrow.items():
        axis = 0 if "lora_A" in name else 1
        kept, rest = np.split(found[name], [held.shape[axis]], axis)
        np.testing.assert_array_equal(kept, held)
        assert not rest.any()
        assert found[name].shape[axis] == rank
        padded += rest.size
    assert padded > 0
    peer = torch_model(lotaqaf_jax.load_pretrained(whole, dtype=jnp.float32, progress=False))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12), dtype=np.int32)
    with torch.no_grad():
        without = peer(input_ids=torch.from_numpy(ids).long()).logits.numpy()
        peer = peft.PeftModel.from_pretrained(peer, str(tmp_path / "lora"))
        theirs = peer(input_ids=torch.from_numpy(ids).long()).logits.numpy()
    ours = np.asarray(model(ids))
    np.testing.assert_allclose(theirs, ours, atol=2e-4 * np.abs(ours).max())
    assert np.abs(without - ours).max() > 0.01 * np.abs(ours).max()
    _, plain = merged(ACT_ORDER, "none")
    with pytest.raises(ConfigError, match="has no offset"):
        convert.save_pretrained(plain, tmp_path / "none", base=base, target="peft", progress=False)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = merged(BASES[4], "none")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    convert.save_pretrained(model, whole, base=base, target="mlx", progress=False)
    monkeypatch.setattr("convert.shards.SHARD_BYTES", 40_000)
    convert.save_pretrained(model, parts, base=base, target="mlx", progress=False)
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2
    joined: dict[str, np.ndarray] = {}
    where = json.loads((parts / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        here = load_file(file)
        assert all(where[name] == file.name for name in here)
        joined |= here
    expected = load_file(whole / "model.safetensors")
    assert joined.keys() == expected.keys() == where.keys()
    assert all(np.array_equal(joined[name], expected[name]) for name in expected)


def test_the_docs_have_the_table_of_targets() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith(tuple(f"| `{name}` |" for name in convert.TARGETS))]
    assert rows == [table_row(target) for target in convert.TARGETS.values()]
