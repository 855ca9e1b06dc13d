"""A checkpoint folder on disk: what is read, and what is said about one that is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.quant.folder import INDEX, CheckpointFolder, read_header

QUANT = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def write(folder: Path, name: str, content: Any) -> Path:
    """Write JSON, or text or bytes as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header and any stated header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two float16 tensors and a config."""
    write(tmp_path, "config.json", {"model_type": "llama", "quantization_config": QUANT})
    save_file(
        {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(4, np.float16)}, tmp_path / "model.safetensors"
    )
    return tmp_path


def test_every_type_is_read_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    types = (
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        np.int64,
        np.int32,
        np.int16,
        np.int8,
        np.uint8,
        np.bool_,
    )
    tensors = {np.dtype(t).name: rng.integers(0, 2, (3, 5)).astype(t) for t in types}
    tensors |= {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.int32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write(tmp_path, "config.json", {})
    opened = CheckpointFolder(tmp_path)
    assert set(opened.tensors) == set(tensors)
    assert opened.nbytes == sum(array.nbytes for array in tensors.values())
    for name, array in tensors.items():
        found = opened.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found, array, err_msg=name)


def test_tensors_are_views_of_the_file_and_cannot_be_written_to(folder: Path) -> None:
    array = CheckpointFolder(folder).read("a")
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_shards_are_read_through_the_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"c": np.full(2, 7, np.int32)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    write(folder, INDEX, {"weight_map": weight_map | {"c": "model-00002-of-00002.safetensors"}})
    opened = CheckpointFolder(folder)
    assert [path.name for path in opened.shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    np.testing.assert_array_equal(opened.read("c"), [7, 7])

    write(folder, INDEX, {"weight_map": weight_map | {"c": "model-00001-of-00002.safetensors"}})
    with pytest.raises(CheckpointError, match=r"index\.json: 1 tensors .* the first c in model-00001-of-00002"):
        CheckpointFolder(folder)
    write(folder, INDEX, {"weight_map": weight_map | {"c": "model-00003-of-00002.safetensors"}})
    with pytest.raises(CheckpointError, match=r"model-00003-of-00002\.safetensors: the shard is missing"):
        CheckpointFolder(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_named(folder: Path, index: Any) -> None:
    write(folder, INDEX, index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: 'weight_map' is missing"):
        CheckpointFolder(folder)


def test_a_single_file_of_another_name_is_read_but_several_need_an_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert set(CheckpointFolder(folder).tensors) == {"a", "b"}
    save_file({"c": np.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        CheckpointFolder(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        CheckpointFolder(folder).read("model.norm.weight")


def test_what_is_not_a_checkpoint_folder_is_said_so(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        CheckpointFolder(folder / "nowhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a folder"):
        CheckpointFolder(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        CheckpointFolder(folder)
    write(folder, "pytorch_model.bin", b"")
    with pytest.raises(CheckpointError, match=r"It holds pytorch_model\.bin: convert it to safetensors first"):
        CheckpointFolder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        CheckpointFolder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("[1, 2]", "found a JSON list, expected an object"),
        ("null", "found a JSON NoneType, expected an object"),
    ],
)
def test_a_config_that_is_no_json_object_is_named(folder: Path, content: str | bytes, message: str) -> None:
    write(folder, "config.json", content)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        CheckpointFolder(folder)


A = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x01",
        safetensors_bytes({"a": A}, b"\0" * 4, length=10**6),
        safetensors_bytes({"a": A}, b"\0" * 4, length=2**63),
        safetensors_bytes(b"not json at all", b"\0" * 4),
        safetensors_bytes(b"[1]", b"\0" * 4),
        safetensors_bytes({"a": A}, b"\0" * 2),
        safetensors_bytes({"a": A}, b"\0" * 9),
        safetensors_bytes({"a": A | {"data_offsets": [0, 400]}}, b"\0" * 4),
        safetensors_bytes({"a": A | {"data_offsets": [4, 0]}}, b"\0" * 4),
        safetensors_bytes({"a": A | {"shape": [3]}}, b"\0" * 4),
        safetensors_bytes({"a": A | {"shape": [2**40, 2**40]}}, b"\0" * 4),
        safetensors_bytes({"a": A, "b": A}, b"\0" * 4),
        safetensors_bytes({"a": A | {"dtype": "F17"}}, b"\0" * 4),
        safetensors_bytes({"a": {"dtype": "F16"}}, b"\0" * 4),
    ],
    ids=[
        "empty",
        "two bytes",
        "header longer than the file",
        "header length absurd",
        "header not JSON",
        "header a list",
        "cut off",
        "bytes left over",
        "offsets beyond the file",
        "offsets reversed",
        "shape larger than its bytes",
        "shape overflows",
        "overlap",
        "unknown type",
        "no shape",
    ],
)
def test_a_damaged_file_is_named(folder: Path, content: bytes) -> None:
    write(folder, "model.safetensors", content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file \(.+\)"):
        CheckpointFolder(folder)


def test_a_real_file_that_is_cut_off_is_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for keep in (7, 40, len(whole) - 1):
        write(folder, "model.safetensors", whole[:keep])
        with pytest.raises(CheckpointError, match="It is truncated or corrupt; download it again"):
            CheckpointFolder(folder)


def test_a_type_that_is_valid_but_not_known_here_names_the_tensor(tmp_path: Path) -> None:
    header = {"odd": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    path = write(tmp_path, "model.safetensors", safetensors_bytes(header, b"\0" * 4))
    with pytest.raises(CheckpointError, match="tensor odd has type F8_E4M3, expected one of"):
        read_header(path)


def test_the_quantisation_config_is_found_in_either_place(folder: Path) -> None:
    assert CheckpointFolder(folder).quantization is not None
    write(folder, "config.json", {"model_type": "llama"})
    assert CheckpointFolder(folder).quantization is None
    write(folder, "quantize_config.json", QUANT | {"bits": 8})
    found = CheckpointFolder(folder).quantization
    assert found is not None
    assert found.default.bits == 8


def test_quantize_config_fills_in_what_config_does_not_say_and_may_not_contradict_it(folder: Path) -> None:
    write(folder, "quantize_config.json", QUANT | {"checkpoint_format": "gptq_v2"})
    found = CheckpointFolder(folder).quantization
    assert found is not None
    assert found.checkpoint_format == "gptq_v2"
    write(folder, "quantize_config.json", QUANT | {"bits": 8})
    with pytest.raises(ConfigError, match=r"bits is 4 in config\.json but 8 in quantize_config\.json"):
        CheckpointFolder(folder)


def test_a_bad_quantisation_config_says_in_which_file(folder: Path) -> None:
    write(folder, "config.json", {"quantization_config": {"quant_method": "hqq", "bits": 4}})
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config: quant_method is 'hqq', expected one of"):
        CheckpointFolder(folder)
    write(folder, "config.json", {})
    write(folder, "quantize_config.json", {"group_size": 32})
    with pytest.raises(ConfigError, match=r"quantize_config\.json: 'bits' is missing"):
        CheckpointFolder(folder)
