"""Folders that other software wrote: read as it reads them, trained, and read by it again after the export."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import lotaqaf_jax
from convert.tensors import quantized_weights
from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.models import DecoderConfig, init_decoder, merge
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model, checkpoint
from tests.interop.conftest import SIZES, run_client, run_jobs
from tests.interop.test_clients import distance

CLIENT = Path(__file__).parent / "writers.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is written: by which library, from which architecture, with which settings; and how far apart logits may be,
    per unit of their mean size: MLX computes in the type of the scales."""

    kind: str
    name: str
    model_type: str
    settings: dict[str, Any]
    residual: float = 0.0  # of MLX's zero points, in steps: z times half a unit in the last place of a scale
    tolerance: float = 1e-3


def _mlx(bits: int, size: int, dtype: str, residual: float, tolerance: float, **more: Any) -> dict[str, Any]:
    settings = {"q_bits": bits, "q_group_size": size, "dtype": dtype} | more
    return {"settings": settings, "residual": residual, "tolerance": tolerance}


def _packed(bits: int, symmetric: bool, size: int | None = None) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    return {"settings": {"num_bits": bits, "symmetric": symmetric} | strategy}


CASES = (
    Case("awq", "g32", "llama", {"group_size": 32}),
    Case("awq", "g64", "qwen2", {"group_size": 64}),
    Case("compressed-tensors", "w4-asym", "llama", **_packed(4, False, 32)),
    Case("compressed-tensors", "w4-sym", "qwen2", **_packed(4, True, 64)),
    Case("compressed-tensors", "w8-channel", "llama", **_packed(8, True)),
    Case("compressed-tensors", "w8-asym-channel", "qwen2", **_packed(8, False)),
    Case("compressed-tensors", "w3-asym", "llama", **_packed(3, False, 32)),
    Case("mlx", "4bit-fp16", "llama", **_mlx(4, 64, "float16", 15 * 2**-11, 0.1)),
    Case("mlx", "4bit-bf16", "qwen2", **_mlx(4, 32, "bfloat16", 15 * 2**-8, 0.5)),
    Case("mlx", "4bit-fp32", "qwen2", **_mlx(4, 32, "float32", 1e-5, 1e-3)),
    Case("mlx", "3bit-fp32", "llama", **_mlx(3, 64, "float32", 1e-5, 1e-3)),
    Case("mlx", "2bit-fp16", "llama", **_mlx(2, 128, "float16", 1e-3, 0.05)),
    Case("mlx", "8bit-fp32", "llama", **_mlx(8, 64, "float32", 1e-4, 1e-3)),
    Case("mlx", "some-fp32", "llama", **_mlx(4, 64, "float32", 1e-5, 1e-3, dense="embed|lm_head|k_proj")),
)
REFUSED = Case("mlx", "8bit-bf16", "llama", **_mlx(8, 64, "bfloat16", 1.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Round:
    """One case, for "base" and "merged": weights and logits of theirs, weights and logits of ours, and the scales."""

    theirs: dict[str, tuple[dict[str, np.ndarray], np.ndarray]]
    ours: dict[str, tuple[dict[str, np.ndarray], np.ndarray]]
    scales: dict[str, np.ndarray]
    moved: float


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, client_python: str) -> Path:
    """A folder of 16-bit models and what the libraries made of them."""
    root = tmp_path_factory.mktemp("import")
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256}
    for model_type in ("llama", "qwen2"):
        config = DecoderConfig.from_hf({"model_type": model_type, "tie_word_embeddings": model_type == "qwen2"} | sizes)
        dense = init_decoder(config, jax.random.key(0), dtype=jnp.float16, scale=0.1)
        # mlx-lm 0.32 does not read `rope_parameters`, and takes another theta for Qwen2.
        given = {"config": {"rope_theta": config.rope_theta}, "tokenizer_from": checkpoint("tokenizer")}
        convert.write_checkpoint(dense, root / model_type, progress=False, **given)
    jobs = [
        {
            "kind": case.kind,
            "source": str(root / case.model_type),
            "folder": str(root / f"{case.kind}-{case.name}"),
            "settings": case.settings,
        }
        for case in (*CASES, REFUSED)
    ]
    failed = run_jobs(client_python, CLIENT, jobs, root / "write.json")
    assert not failed, "\n".join(failed.values())
    return root


def _ours(folder: Path, ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = lotaqaf_jax.load_pretrained(folder, dtype=jnp.float32, progress=False)
    weights, scales = {}, {}
    for name, weight in quantized_weights(model):
        weights[name] = np.asarray(weight.dequantize())
        scales[name] = np.asarray(weight.spread(jnp.abs(weight.scales.astype(jnp.float32))))
    return weights, np.asarray(model(ids)), scales


@pytest.fixture(scope="module")
def rounds(root: Path, client_python: str) -> dict[str, Round]:
    ids = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 24), dtype=np.int32)
    np.save(root / "ids.npy", ids)
    jobs, ours, scales, moved = [], {}, {}, {}
    for case in CASES:
        base = CheckpointFolder(root / f"{case.kind}-{case.name}")
        model = adapter_model(base, offset="none")
        merged = root / f"{case.kind}-{case.name}-merged"
        moved[case.name] = convert.merge_and_save(model, merged, base=base, progress=False).moved_share
        for what, folder in (("base", base.path), ("merged", merged)):
            weights, logits, scale = _ours(folder, ids)
            ours[case.kind, case.name, what], scales[case.kind, case.name] = (weights, logits), scale
            job = {"kind": case.kind, "folder": str(folder), "input_ids": str(root / "ids.npy")}
            jobs.append(job | {"weights": f"{folder}.npz", "logits": f"{folder}.npy"})
    failed = run_jobs(client_python, CLIENT, jobs, root / "read.json")
    assert not failed, "\n".join(failed.values())
    found = {}
    for case in CASES:
        key = case.kind, case.name
        theirs = {}
        for what, tail in (("base", ""), ("merged", "-merged")):
            folder = root / f"{case.kind}-{case.name}{tail}"
            with np.load(f"{folder}.npz") as weights:
                theirs[what] = dict(weights), np.load(f"{folder}.npy")
        mine = {what: ours[*key, what] for what in ("base", "merged")}
        found[f"{case.kind}-{case.name}"] = Round(theirs, mine, scales[key], moved[case.name])
    return found


each = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.name}")


@each
@pytest.mark.parametrize("what", ["base", "merged"])
def test_weights_are_the_librarys(rounds: dict[str, Round], case: Case, what: str) -> None:
    """In steps of the grid, up to MLX's residual and the rounding of float32."""
    found = rounds[f"{case.kind}-{case.name}"]
    ours, theirs = found.ours[what][0], found.theirs[what][0]
    theirs.pop("model.embed_tokens", None)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        apart = np.abs(weight - theirs[name]) / found.scales[name]
        assert apart.max() <= case.residual * 1.01 + 1e-4, name


@each
def test_the_export_moves_their_weights_by_steps(rounds: dict[str, Round], case: Case) -> None:
    """What the library reads of the merged folder lies one step beside what it reads of the base, or where it was."""
    found = rounds[f"{case.kind}-{case.name}"]
    moved = total = 0
    for name, scales in found.scales.items():
        steps = (found.theirs["merged"][0][name] - found.theirs["base"][0][name]) / scales
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
        assert np.abs(steps).max() < 1.5
        moved, total = moved + np.count_nonzero(np.round(steps)), total + steps.size
    assert moved / total == pytest.approx(found.moved)
    assert found.moved > 0.01


@each
@pytest.mark.parametrize("what", ["base", "merged"])
def test_logits_are_the_librarys(rounds: dict[str, Round], case: Case, what: str) -> None:
    found = rounds[f"{case.kind}-{case.name}"]
    ours, theirs = found.ours[what][1], found.theirs[what][1]
    size = np.mean(np.abs(ours))
    apart = np.max(np.abs(ours - theirs)) / size
    print(f"{case.kind} {case.name} {what}: {apart:.2e}")
    assert apart <= case.tolerance
    # The check can see a merge: base and merged model are further apart.
    assert np.max(np.abs(found.ours["base"][1] - found.ours["merged"][1])) / size > 2 * case.tolerance


def test_8_bit_in_a_16_bit_type_is_refused(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"biases: -biases/scales is up to 0\.\d+ of a step"):
        lotaqaf_jax.load_pretrained(root / f"mlx-{REFUSED.name}", progress=False)


OFFSETS = (
    ("awq-g32", "awq"),
    ("awq-g64", "awq"),
    ("awq-g32", "awq-gptqmodel"),
    ("compressed-tensors-w4-asym", "compressed-tensors"),
    ("compressed-tensors-w4-sym", "compressed-tensors"),
    ("compressed-tensors-w8-channel", "compressed-tensors"),
)


@pytest.fixture(scope="module")
def with_offsets(
    root: Path, client_python: str
) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray, np.ndarray | str]]:
    """Our logits and the client's, by folder, client and LoRA: that in the merged folder, or that of target peft."""
    ids = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 24), dtype=np.int32)
    np.save(root / "offset.ids.npy", ids)
    jobs: list[dict[str, object]] = []
    ours = {}
    for name in dict(OFFSETS):
        base, merged = CheckpointFolder(root / name), root / f"{name}-offset"
        model = adapter_model(base, offset="reference")
        convert.merge_and_save(model, merged, base=base, progress=False)
        lora = root / f"{name}-lora"
        convert.save_pretrained(merge(model), lora, base=base, target="peft", progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            plain = lotaqaf_jax.load_pretrained(merged, dtype=jnp.float32, progress=False)
        ours[name] = np.asarray(model(ids)), np.asarray(plain(ids))
    asked = {}
    for name, kind in OFFSETS:
        for what, adapter in (("beside", root / f"{name}-offset" / "offset_adapter"), ("peft", root / f"{name}-lora")):
            output = root / f"{name}-{kind}-{what}.npy"
            job = {"kind": kind, "folder": str(root / f"{name}-offset"), "bits": 4}
            jobs.append(job | {"adapter": str(adapter), "input_ids": str(root / "offset.ids.npy")})
            jobs[-1] |= {"output": str(output)}
            asked[name, kind, what] = str(output)
    found = run_client(client_python, jobs, root)
    return {key: (*ours[key[0]], found[output]) for key, output in asked.items()}


@pytest.mark.parametrize(("name", "kind"), OFFSETS)
@pytest.mark.parametrize("what", ["beside", "peft"])
def test_the_offset_beside_other_formats(
    with_offsets: dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray, np.ndarray | str]],
    name: str,
    kind: str,
    what: str,
) -> None:
    """PEFT, and GPTQModel's adapters, put mu on a merged AWQ or compressed-tensors folder."""
    ours, without, theirs = with_offsets[name, kind, what]
    here = distance(ours, theirs)
    print(f"{name} {kind} {what}: {here:.2e}")
    assert here <= (0.03 if kind == "awq-gptqmodel" else 0.015)
    assert distance(ours, without) > 4 * here  # mu is seen
