"""AWQ: 4 bit with whole zero points, the form in which vLLM and SGLang take asymmetric 4-bit weights.

    qweight   (in, out/8) int32    eight outputs a word; the i-th four bits are output ORDER[i] of the eight
    qzeros    (in/group_size, out/8) int32    likewise, zero points as they are
    scales    (in/group_size, out) float16

Without an offset this only packs the same numbers another way. With one, z - mu is rounded to a whole number: half a
step at worst, so it is refused unless asked for.

Source: AutoAWQ's "gemm" version, as transformers, GPTQModel and vLLM read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.targets.host import HostWeight
from convert.targets.target import Record, Source, Target
from convert.targets.tensors import Form, form_size, write_folder
from convert.tensors import named_linears
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.quant.formats.awq import ORDER

__all__ = ["AWQ"]


def _shapes(weight: QuantizedWeight) -> dict[str, tuple[Any, tuple[int, ...]]]:
    n_in, n_out = weight.shape
    return {
        "qweight": (np.int32, (n_in, n_out // 8)),
        "qzeros": (np.int32, (weight.groups, n_out // 8)),
        "scales": (np.float16, (weight.groups, n_out)),
    }


def _pack(values: np.ndarray) -> np.ndarray:
    """(rows, columns) in {0, ..., 15} -> (rows, columns/8) int32."""
    eights = values.reshape(len(values), -1, 8).astype(np.uint32)
    words = np.zeros(eights.shape[:2], np.uint32)
    for i, column in enumerate(ORDER):
        words |= eights[:, :, column] << np.uint32(4 * i)
    return words.view(np.int32)


def _unpack(words: np.ndarray) -> np.ndarray:
    eights = np.empty((*words.shape, 8), np.uint8)
    for i, column in enumerate(ORDER):
        eights[:, :, column] = (words.view(np.uint32) >> np.uint32(4 * i)) & 15
    return eights.reshape(len(words), -1)


def _convert(weight: HostWeight) -> dict[str, np.ndarray]:
    zeros = np.clip(np.rint(weight.zeros - weight.offset.astype(np.float64)), 0, 15)
    return {
        "qweight": _pack(weight.integers),
        "qzeros": _pack(zeros),
        "scales": weight.scales.astype(np.float16),
    }


def _decode(arrays: Mapping[str, np.ndarray], weight: HostWeight) -> np.ndarray:
    steps = _unpack(arrays["qweight"]).astype(np.float64) - weight.spread(_unpack(arrays["qzeros"]).astype(np.float64))
    return weight.spread(arrays["scales"].astype(np.float64)) * steps


_FORM = Form(_shapes, _convert, _decode, {"qweight": 1, "qzeros": 1, "scales": 1})


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    sizes = {linear.packed.group_size for _, linear, _ in named_linears(model) if linear.is_quantized}
    if len(sizes) > 1:
        raise ConfigError(
            f"--target awq: groups of {', '.join(map(str, sorted(sizes)))} rows, it holds one size. Use --target gptq."
        )
    if model.lm_head is not None and model.lm_head.is_quantized:
        raise ConfigError("--target awq: the output head is quantised, which no reader expects. Use --target gptq.")
    dense = [name for name, linear, _ in named_linears(model) if not linear.is_quantized]
    said = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop(),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [name for name in dense if name != "lm_head"] or None,
    }
    write_folder(model, source, folder, record, progress, form=_FORM, settings={"quantization_config": said})


AWQ = Target(
    name="awq",
    title="AWQ",
    bits=(4,),
    group_sizes=(32, 64, 128),
    act_order=False,
    partial=False,
    outputs=8,
    offset="rounded into the zero points",
    exact="without an offset, and with scales that float16 holds; else off by up to half a step",
    runtimes=("vLLM", "SGLang", "GPTQModel", "transformers"),
    size=lambda model, _: form_size(model, _FORM),
    write=_write,
)
