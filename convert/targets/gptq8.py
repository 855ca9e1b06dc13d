"""GPTQ of 8 bits, symmetric, on a finer grid: for runtimes that take no other zero points, at twice the size.

    q' = k (q - z) + round(k mu) + 128,   s' = s / k,   zero point 128

k = 1 where mu is 0, which changes nothing. Elsewhere k = 32, 16, 8 at 2, 3, 4 bit, the largest power of two for which
every q' fits: mu is rounded to 1/k of a step, off by up to 1/(2k). Dividing by k is exact but for scales below the
normal numbers of their type.

Source: GPTQ on disk; the 8-bit symmetric kind that vLLM takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf_config import quantization_config
from convert.targets.host import HostWeight
from convert.targets.target import Record, Source, Target
from convert.targets.tensors import Form, form_size, write_folder
from convert.writing import write_json
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.parallel.processes import is_main
from lotaqaf_jax.quant import QuantizedWeight, encode_zeros, pack, packed_size, unpack

__all__ = ["GPTQ8"]

FINER = {2: 32, 3: 16, 4: 8}
ZERO = 128


def _shapes(weight: QuantizedWeight) -> dict[str, tuple[Any, tuple[int, ...]]]:
    n_in, n_out = weight.shape
    return {
        "qweight": (np.int32, (packed_size(n_in, 8), n_out)),
        "qzeros": (np.int32, (weight.groups, packed_size(n_out, 8))),
        "scales": (np.dtype(weight.scales.dtype), (weight.groups, n_out)),
        "g_idx": (np.int32, (n_in,)),
    }


def _convert(weight: HostWeight) -> dict[str, np.ndarray]:
    k = np.where(weight.offset == 0, 1.0, float(FINER[weight.bits]))
    shift = np.rint(k * weight.offset) - k * weight.zeros
    finer = np.clip(weight.spread(k) * weight.integers + weight.spread(shift) + ZERO, 0, 255)
    return {
        "qweight": np.asarray(pack(finer.astype(np.uint8), 8)),
        "qzeros": np.asarray(encode_zeros(np.full(weight.zeros.shape, ZERO, np.uint8), 8, "gptq")),
        "scales": (weight.scales.astype(np.float64) / k).astype(weight.scales.dtype),
        "g_idx": weight.g_idx.astype(np.int32),
    }


def _decode(arrays: Mapping[str, np.ndarray], weight: HostWeight) -> np.ndarray:
    q = np.asarray(unpack(arrays["qweight"], 8, len(weight.integers))).astype(np.float64)
    return weight.spread(arrays["scales"].astype(np.float64)) * (q - ZERO)


_FORM = Form(_shapes, _convert, _decode, {"qweight": 1, "qzeros": 1, "scales": 1, "g_idx": None})


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    said = quantization_config(model) or {}
    said |= {"bits": 8, "sym": True, "checkpoint_format": "gptq"}
    said["dynamic"] = {key: value | ({"bits": 8} if value else {}) for key, value in said.get("dynamic", {}).items()}
    if all(not value or value["group_size"] == said["group_size"] for value in said["dynamic"].values()):
        said["dynamic"] = {key: value for key, value in said["dynamic"].items() if not value}
    if not said["dynamic"]:
        del said["dynamic"]
    if is_main():
        write_json(folder / "quantize_config.json", said)
    write_folder(model, source, folder, record, progress, form=_FORM, settings={"quantization_config": said})


GPTQ8 = Target(
    name="gptq8",
    title="GPTQ, 8 bit symmetric",
    bits=tuple(FINER),
    offset="rounded to 1/8, 1/16, 1/32 of a step at 4, 3, 2 bit",
    exact="without an offset; else off by up to 1/16, 1/32, 1/64 of a step",
    runtimes=("vLLM", "SGLang", "GPTQModel", "transformers"),
    size=lambda model, _: form_size(model, _FORM),
    write=_write,
)
