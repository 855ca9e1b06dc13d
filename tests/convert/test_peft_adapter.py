"""A LoRA on disk is PEFT's: PEFT reads ours, and we read what PEFT writes, onto quantised and 16-bit models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import convert
from convert.__main__ import main
from lotaqaf_jax.errors import AdapterError, ConfigError, VerificationError
from lotaqaf_jax.models import Decoder, adapted_linears, add_lora
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.models.tiny import set_random_low_rank
from tests.peer import lora_tensors, torch_model

IDS = np.random.default_rng(3).integers(0, 320, (2, 10))
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(base: CheckpointFolder) -> Decoder:
    return load_decoder(base, jnp.float32, progress=False)


@pytest.fixture(scope="module")
def lora(plain: Decoder) -> Decoder:
    model = add_lora(plain, rank=4, alpha=6.0)
    set_random_low_rank(model)
    return model


@pytest.fixture(scope="module")
def saved(lora: Decoder, base: CheckpointFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    convert.save_adapter(lora, folder, base=base, progress=False)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


def close(ours: Decoder, theirs: np.ndarray) -> None:
    found = np.asarray(ours(jnp.asarray(IDS, jnp.int32)))
    np.testing.assert_allclose(found, theirs, atol=2e-4 * np.abs(theirs).max())


def test_round_trip_is_exact(base: CheckpointFolder, plain: Decoder, lora: Decoder, saved: Path) -> None:
    loaded = convert.load_adapter(plain, saved, base=base)
    for (names, _, one), (found, _, other) in zip(adapted_linears(lora), adapted_linears(loaded), strict=True):
        assert names == found
        assert (one.alpha, one.rank) == (other.alpha, other.rank) == (6.0, 4)
        np.testing.assert_array_equal(one.a, other.a)
        np.testing.assert_array_equal(one.b, other.b)
        assert other.a.dtype == np.float32


def test_the_config_is_one_of_pefts_class(saved: Path) -> None:
    """It has all keys of ours and takes their values as they are."""
    said = json.loads((saved / "adapter_config.json").read_text())
    made = peft.LoraConfig(**{key: value for key, value in said.items() if key != "peft_type"}).to_dict()
    assert said["peft_type"] == made["peft_type"].value
    assert set(said.pop("target_modules")) == made["target_modules"]
    assert said == {key: made[key] for key in said}


def test_peft_reads_ours(plain: Decoder, lora: Decoder, saved: Path) -> None:
    peer = torch_model(plain)
    without = logits(peer)
    theirs = logits(peft.PeftModel.from_pretrained(peer, str(saved)))
    close(lora, theirs)
    assert np.abs(theirs - without).max() > 0.1 * np.abs(without).max()


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_pefts(base: CheckpointFolder, plain: Decoder, tmp_path: Path, rslora: bool) -> None:
    """Ranks by projection, a layer left out, 16-bit tensors."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "down_proj", "up_proj"],
        rank_pattern={"down_proj": 6},
        alpha_pattern={"down_proj": 9, r"mlp\.up_proj": 4},
        layers_to_transform=[1],
        use_rslora=rslora,
        init_lora_weights=False,
    )
    peer = peft.get_peft_model(torch_model(plain), config).bfloat16().float()
    theirs = logits(peer)
    peer.bfloat16().save_pretrained(str(tmp_path / "theirs"))
    assert load_file_types(tmp_path / "theirs") == {"BF16"}
    loaded = convert.load_adapter(plain, tmp_path / "theirs", base=base)
    assert {names[0].rsplit(".", 1)[1]: pair.rank for names, _, pair in adapted_linears(loaded)} == {
        "q_proj": 3,
        "up_proj": 3,
        "down_proj": 6,
    }
    assert not any(pair.b[0].any() for _, _, pair in adapted_linears(loaded)), "layer 0 has no LoRA"
    # The peer's own weights are rounded to bfloat16 above, ours are not.
    ours = np.asarray(loaded(jnp.asarray(IDS, jnp.int32)))
    assert np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max()


def load_file_types(folder: Path) -> set[str]:
    with (folder / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def test_targets_are_the_projections_that_have_adapters(base: CheckpointFolder, plain: Decoder, tmp_path: Path) -> None:
    convert.save_adapter(add_lora(plain, rank=2, target_modules=("q_proj", "o_proj")), tmp_path / "some", base=base)
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "o_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 4, {})


def test_a_model_in_16_bit(tmp_path: Path, plain: Decoder) -> None:
    """Trained beside quantised weights or not, a LoRA is the same kind of folder; its base has no fingerprint."""
    torch_model(plain).half().save_pretrained(tmp_path / "dense")
    base = CheckpointFolder(tmp_path / "dense")
    model = add_lora(load_decoder(base, jnp.float32, progress=False), rank=3)
    set_random_low_rank(model, seed=1)
    convert.save_adapter(model, tmp_path / "adapter", base=base, progress=False)
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    close(model, logits(peft.PeftModel.from_pretrained(peer, str(tmp_path / "adapter"))))
    loaded = convert.load_adapter(load_decoder(base, jnp.float32, progress=False), tmp_path / "adapter", base=base)
    np.testing.assert_array_equal(loaded(IDS), model(IDS))
    with pytest.raises(AdapterError, match="nothing in it is quantised"):
        convert.fingerprint(base)


BAD: list[tuple[dict[str, object], str]] = [
    ({"use_dora": True}, "use_dora is True, which is not computed here"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    ({"r": 8}, r"expected float32 or float16 or bfloat16 \(8, 64\)"),
    ({"r": "8"}, "r of model.layers.0.self_attn.q_proj is '8'"),
    ({"lora_alpha": 0}, "alpha: found 0"),
    ({"rank_pattern": {r"layers\.1\..*": 2}}, "need the same"),
    ({"peft_type": "IA3"}, "method is 'IA3', expected one of lota-qaf, qa-lora, or a LoRA of PEFT's"),
]


@pytest.mark.parametrize(("changes", "says"), BAD)
def test_what_is_not_computed_is_refused_by_name(
    copy: Path, base: CheckpointFolder, plain: Decoder, changes: dict[str, object], says: str
) -> None:
    edit(copy, **changes)
    with pytest.raises(AdapterError, match=says):
        convert.load_adapter(plain, copy, base=base)


def test_bad_tensors_are_named(copy: Path, base: CheckpointFolder, plain: Decoder) -> None:
    path = copy / "adapter_model.safetensors"
    good = load_file(path)
    key = f"base_model.model.{Q}.lora_B.weight"

    def refused(tensors: dict[str, np.ndarray], says: str) -> None:
        save_file(tensors, path)
        with pytest.raises(AdapterError, match=says):
            convert.load_adapter(plain, copy, base=base)

    bad = good[key].copy()
    bad[2, 3] = np.nan
    refused(good | {key: bad}, f"{key}: holds values that are NaN")
    refused({name: value for name, value in good.items() if name != key}, f"{key} is missing")
    refused(good | {key: good[key].astype(np.int8)}, f"{key} is int8")
    refused(good | {"base_model.model.lm_head.lora_A.weight": bad}, "no place in")
    refused({}, "holds no adapters")
    path.unlink()
    with pytest.raises(AdapterError, match="the shard is missing"):
        convert.load_adapter(plain, copy, base=base)


def test_a_lora_goes_on_once_and_is_not_merged(
    base: CheckpointFolder, lora: Decoder, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AdapterError, match="has adapters already"):
        convert.load_adapter(lora, saved, base=base)
    with pytest.raises(AdapterError, match="has LoRA adapters, whose product lies on no grid"):
        convert.merge_and_save(lora, tmp_path / "merged", base=base, progress=False)
    with pytest.raises(ConfigError, match="adapters that are not merged"):
        convert.save_pretrained(lora, tmp_path / "merged", base=base)
    with pytest.raises(VerificationError, match="has LoRA adapters, which no merged folder can hold"):
        convert.verify(base, base.path, model=lora, progress=False)
    command = ["merge", "--model", str(base.path), "--adapter", str(saved), "--output", str(tmp_path / "merged")]
    assert main([*command, "--quiet"]) == 2
    assert "LoRA adapters" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_lora_tensors_are_transposed(lora: Decoder, saved: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    expected = {f"base_model.model.{name}.weight": array for name, (_, array) in lora_tensors(lora).items()}
    assert tensors.keys() == expected.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.dtype == np.float32


def test_export_to_peft_writes_a_lora_as_it_is(
    base: CheckpointFolder, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["export", "--model", str(base.path), "--adapter", str(saved), "--quiet"]
    assert main([*flags, "--target", "peft", "--output", str(tmp_path / "out")]) == 0
    for path in saved.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert main([*flags, "--target", "mlx", "--output", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
