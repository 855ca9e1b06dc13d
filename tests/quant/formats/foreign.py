"""AWQ, compressed-tensors and MLX by their descriptions alone, in plain numpy: arrays, and whole folders.

Written for these tests, a value or a bit at a time; nothing of the package's packing is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Arrays = dict[str, np.ndarray]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of field k, lowest bits first


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of values as int32 words, one value's bits after the other's."""
    rows = []
    for row in values.tolist():
        number = sum(value << (bits * i) for i, value in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(-(-len(row) * bits // 32) * 4, "little"), "<i4"))
    return np.stack(rows)


def unstream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`stream`."""
    rows = []
    for row in words:
        number = int.from_bytes(np.ascontiguousarray(row).tobytes(), "little")
        rows.append([(number >> (bits * i)) & (2**bits - 1) for i in range(count)])
    return np.array(rows)


def awq_words(values: np.ndarray) -> np.ndarray:
    """(rows, columns) -> (rows, columns/8) int32."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
    for i, row in enumerate(values.tolist()):
        for j in range(0, len(row), 8):
            words[i, j // 8] = sum(row[j + column] << (4 * k) for k, column in enumerate(AWQ_ORDER))
    return words.astype(np.uint32).view(np.int32)


def awq_values(words: np.ndarray) -> np.ndarray:
    """The inverse of :func:`awq_words`."""
    values = np.zeros((words.shape[0], words.shape[1] * 8), np.int64)
    for i, row in enumerate(words.view(np.uint32).tolist()):
        for j, word in enumerate(row):
            for k, column in enumerate(AWQ_ORDER):
                values[i, 8 * j + column] = (word >> (4 * k)) & 15
    return values


def awq(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int = 4) -> Arrays:
    """A module of AWQ: q (in, out), zeros and scales (groups, out)."""
    return {"qweight": awq_words(q), "qzeros": awq_words(zeros), "scales": scales}


def compressed(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int) -> Arrays:
    """A module of compressed-tensors; symmetric, so without zero points, where all of them are in the middle."""
    parts = {
        "weight_packed": stream(q.T, bits),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array(q.shape[::-1]),
    }
    if not np.all(zeros == 2 ** (bits - 1)):
        parts["weight_zero_point"] = np.ascontiguousarray(stream(zeros, bits).T)
    return parts


def mlx(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int) -> Arrays:
    """A module of MLX."""
    biases = (-zeros * scales.astype(np.float64)).astype(scales.dtype)
    return {
        "weight": stream(q.T, bits).view(np.uint32),
        "scales": np.ascontiguousarray(scales.T),
        "biases": np.ascontiguousarray(biases.T),
    }


def awq_config(bits: int, group_size: int, **_: Any) -> dict[str, Any]:
    said = {"quant_method": "awq", "bits": bits, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return {"quantization_config": said}


def compressed_config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme}}
    return {"quantization_config": said | {"ignore": ["lm_head"]}}


def mlx_config(bits: int, group_size: int, **_: Any) -> dict[str, Any]:
    said = {"group_size": group_size, "bits": bits, "mode": "affine"}
    return {"quantization": said, "quantization_config": said}


WRITERS: dict[str, tuple[Callable[..., Arrays], Callable[..., dict[str, Any]]]] = {
    "awq": (awq, awq_config),
    "compressed-tensors": (compressed, compressed_config),
    "mlx": (mlx, mlx_config),
}
INTEGERS = {"awq": "qweight", "compressed-tensors": "weight_packed", "mlx": "weight"}


def numbers_of(tensors: Arrays, module: str, bits: int, checkpoint_format: str) -> tuple[np.ndarray, ...]:
    """q (in, out), zeros and scales (groups, out) and g_idx of a GPTQ module."""
    part = {name: tensors[f"{module}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    q = unstream(part["qweight"].T, bits, len(part["g_idx"])).T
    words, minus_one = part["qzeros"].view(np.uint32), int(checkpoint_format == "gptq")
    if bits == 3:
        zeros = (unstream(words, bits, q.shape[1]) + minus_one) % 8
    else:  # one is taken from every field by one subtraction, so that a zero point of 0 borrows from the next
        ones = sum(minus_one << i for i in range(0, 32, bits))
        zeros = unstream(words + np.uint32(ones), bits, q.shape[1])
    return q, zeros, part["scales"], part["g_idx"]


def folder_of(kind: str, source: Path, target: Path, *, scales: Any = None, **config: Any) -> Path:
    """A GPTQ folder of one format and width, rewritten in another format with the same numbers.

    Args:
        kind: a key of :data:`WRITERS`.
        source: the GPTQ folder.
        target: the new folder.
        scales: their type; None for that of the source.
        config: keys of the new config.json.
    """
    write, describe = WRITERS[kind]
    whole = json.loads((source / "config.json").read_text())
    said = whole.pop("quantization_config")
    tensors = load_file(source / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    new = {name: array for name, array in tensors.items() if name.rpartition(".")[0] not in modules}
    new |= {name: array for name, array in tensors.items() if name.endswith(".bias")}
    symmetric = True
    for module in modules:
        q, zeros, scale, g_idx = numbers_of(tensors, module, said["bits"], said.get("checkpoint_format", "gptq"))
        symmetric = symmetric and bool(np.all(zeros == 2 ** (said["bits"] - 1)))
        parts = write(q, zeros, scale.astype(scales or scale.dtype), said["bits"])
        if said.get("desc_act") and kind == "compressed-tensors":
            parts["weight_g_idx"] = g_idx
        new |= {f"{module}.{part}": array for part, array in parts.items()}
    target.mkdir()
    for path in (*source.glob("*token*.json"), *source.glob("generation_config.json")):
        shutil.copyfile(path, target / path.name)
    save_file(new, target / "model.safetensors", {"format": "pt"})
    described = describe(said["bits"], said["group_size"], symmetric=symmetric)
    (target / "config.json").write_text(json.dumps(whole | described | config, indent=2))
    return target


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Values as a type of scales holds them."""
    return values.astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
