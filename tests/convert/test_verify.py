"""Every check of the proof can fail, and names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.verify import Report
from lotaqaf_jax.errors import VerificationError
from lotaqaf_jax.models import Decoder, add_qalora
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model
from tests.models.tiny import set_random_low_rank

Q = "model.layers.0.self_attn.q_proj"


def damage(folder: Path, name: str, change: object = None, *, index: tuple[int, ...] = (0, 0)) -> None:
    """Change one value of a tensor in place, leaving the file's layout alone."""
    entry = CheckpointFolder(folder).tensors[name]
    array = np.memmap(entry.file, entry.dtype, "r+", entry.start, entry.shape)
    array[index[: array.ndim]] = change
    array.flush()


def test_report_says_what_moved(exported: tuple[Path, Report], base: CheckpointFolder) -> None:
    """The share by the file's own words, unpacked in numpy."""
    report = exported[1]
    moved = total = 0
    for name in base.tensors:
        if name.endswith(".qweight"):
            words = (folder.read(name).view(np.uint32) for folder in (base, CheckpointFolder(exported[0])))
            old, new = (np.stack([(w >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)]) for w in words)
            moved, total = moved + int((old != new).sum()), total + old.size
    assert report.moved_share == moved / total
    assert 0.01 < report.moved_share < 0.2
    assert (report.largest_move, report.tokens) == (1, 64)
    assert report.identical_tensors == sum(not name.endswith(".qweight") for name in base.tensors)
    assert report.bytes_before == report.bytes_after == base.nbytes
    assert "bit-identical" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["moved_share"] == report.moved_share


def test_qalora_moves_zero_points_alone(base: CheckpointFolder, tmp_path: Path) -> None:
    """Exported by the same path, with the same proof: not an integer moved, and the logits are the trained ones."""
    model = add_qalora(load_decoder(base, jnp.float32, progress=False), rank=3)
    set_random_low_rank(model)
    convert.save_adapter(model, tmp_path / "adapter", base=base, progress=False)
    report = convert.merge_and_save(model, tmp_path / "merged", base=base, progress=False)
    assert (report.moved_share, report.largest_move, report.tokens) == (0, 0, 64)
    assert report.mean_offset > 0.01
    for name in base.tensors:
        assert np.array_equal(base.read(name), CheckpointFolder(tmp_path / "merged").read(name))
    assert convert.verify(base, tmp_path / "merged", adapter=tmp_path / "adapter", progress=False) == report
    offsets = tmp_path / "merged" / "offset_adapter" / "lota_offset.safetensors"
    held = load_file(offsets)
    save_file(held | {f"{Q}.offset": np.nextafter(held[f"{Q}.offset"], np.float32(9))}, offsets)
    with pytest.raises(VerificationError, match=r"q_proj\.(offset|lora_B)"):
        convert.verify(base, tmp_path / "merged", model=model, progress=False)


def test_adapter_folder_serves_as_the_adapter_model(
    exported: tuple[Path, Report], base: CheckpointFolder, adapter: Path
) -> None:
    assert convert.verify(base, exported[0], adapter=adapter, progress=False) == exported[1]


def test_without_an_adapter_the_logits_are_not_claimed(exported: tuple[Path, Report], base: CheckpointFolder) -> None:
    report = convert.verify(base, exported[0], progress=False)
    assert report.tokens == 0
    assert "not compared" in str(report)


def test_a_larger_move_is_caught(merged: Path, base: CheckpointFolder) -> None:
    """Two steps, and a wrap around the end of the grid."""
    word = int(base.read(f"{Q}.qweight")[0, 0])
    damage(merged, f"{Q}.qweight", word ^ 0x8)
    with pytest.raises(VerificationError, match=rf"{Q}.qweight: an integer moved by 8 steps"):
        convert.verify(base, merged, progress=False)


def test_a_small_move_that_the_adapter_does_not_make_is_caught(
    merged: Path, base: CheckpointFolder, model: Decoder
) -> None:
    old, new = (int(folder.read(f"{Q}.qweight")[0, 0]) for folder in (base, CheckpointFolder(merged)))
    field = old & 0xF if (new ^ old) & 0xF else (old & 0xF) ^ 1
    damage(merged, f"{Q}.qweight", new & ~0xF | field)
    convert.verify(base, merged, progress=False)
    with pytest.raises(VerificationError, match=rf"{Q}.qweight: is not what the adapter makes"):
        convert.verify(base, merged, model=model, progress=False)


@pytest.mark.parametrize(
    ("name", "value"), [(f"{Q}.scales", 1.0), (f"{Q}.qzeros", 7), (f"{Q}.g_idx", 0), ("model.norm.weight", 2.0)]
)
def test_any_other_change_is_caught(merged: Path, base: CheckpointFolder, name: str, value: float) -> None:
    damage(merged, name, value)
    with pytest.raises(VerificationError, match=f"{name}: differs"):
        convert.verify(base, merged, progress=False)


def test_another_layout_is_caught(merged: Path, base: CheckpointFolder) -> None:
    path = merged / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"mu": np.zeros(3, np.float32)}, path)
    with pytest.raises(VerificationError, match="tensor mu is in only one"):
        convert.verify(base, merged, progress=False)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].astype(np.float32)}, path)
    with pytest.raises(VerificationError, match="the base has"):
        convert.verify(base, merged, progress=False)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "tokenizer.json"])
def test_changed_files_are_caught(merged: Path, base: CheckpointFolder, name: str) -> None:
    parsed = json.loads((merged / name).read_text())
    (merged / name).write_text(json.dumps(parsed | {"uninvited": 1}))
    with pytest.raises(VerificationError, match=name):
        convert.verify(base, merged, progress=False)


def test_a_changed_offset_is_caught(merged: Path, base: CheckpointFolder, model: Decoder) -> None:
    folder = merged / "offset_adapter"
    lora, exact = load_file(folder / "adapter_model.safetensors"), load_file(folder / "lota_offset.safetensors")
    key = f"base_model.model.{Q}.lora_B.weight"
    save_file(lora | {key: lora[key] * np.float32(1.001)}, folder / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match="does not hold the scales times mu"):
        convert.verify(base, merged, progress=False)
    save_file(lora, folder / "adapter_model.safetensors")
    exact[f"{Q}.offset"] = np.nextafter(exact[f"{Q}.offset"], np.float32(9))
    save_file(exact, folder / "lota_offset.safetensors")
    with pytest.raises(VerificationError, match=r"mu|scales times mu"):
        convert.verify(base, merged, model=model, progress=False)


def test_logits_of_another_adapter_are_caught(exported: tuple[Path, Report], base: CheckpointFolder) -> None:
    with pytest.raises(VerificationError):
        convert.verify(base, exported[0], model=adapter_model(base, seed=1), progress=False)


def test_a_failed_proof_leaves_nothing(
    base: CheckpointFolder, model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> Report:
        raise VerificationError("a check failed")

    monkeypatch.setattr("convert.save.verify", failing)
    with pytest.raises(VerificationError):
        convert.merge_and_save(model, tmp_path / "merged", base=base, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_other_software_is_told_what_to_load(exported: tuple[Path, Report]) -> None:
    """An asymmetric act-order folder with mu beside it: by the rules of other loaders."""
    vllm = convert.check_runtime(exported[0], "vllm")
    assert len(vllm.reasons) == 2
    assert vllm.targets == ("hf16",)
    assert convert.check_runtime(exported[0], "transformers").targets == ("gptq", "gptq8", "peft", "hf16")
