"""MLX: affine groups, W = scale * q + bias, read by mlx-lm.

    weight   (out, in*bits/32) uint32    the words of GPTQ, transposed: one little-endian stream along the inputs
    scales   (out, in/group_size) float32    s
    biases   (out, in/group_size) float32    s * (mu - z)

so that mu has its place, and float32 holds all of it. MLX's own files have 16-bit scales, which would round the biases.

Source: MLX 0.32, ``mlx.nn.QuantizedLinear``, and config.json as mlx-lm 0.32 writes and reads it.
"""

from __future__ import annotations

from collections import Counter
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
from lotaqaf_jax.quant import QuantizedWeight, pack, packed_size, unpack

__all__ = ["MLX"]


def _shapes(weight: QuantizedWeight) -> dict[str, tuple[Any, tuple[int, ...]]]:
    n_in, n_out = weight.shape
    groups = (n_out, weight.groups)
    words = (n_out, packed_size(n_in, weight.bits))
    return {"weight": (np.uint32, words), "scales": (np.float32, groups), "biases": (np.float32, groups)}


def _convert(weight: HostWeight) -> dict[str, np.ndarray]:
    words = np.asarray(pack(weight.integers.T, weight.bits, axis=1)).view(np.uint32)
    # In float64, so that the product is rounded once.
    scales = weight.scales.astype(np.float64)
    biases = scales * (weight.offset.astype(np.float64) - weight.zeros)
    return {"weight": words, "scales": scales.T.astype(np.float32), "biases": biases.T.astype(np.float32)}


def _decode(arrays: Mapping[str, np.ndarray], weight: HostWeight) -> np.ndarray:
    n_in = weight.integers.shape[0]
    q = np.asarray(unpack(arrays["weight"].view(np.int32), weight.bits, n_in, axis=1)).astype(np.float64)
    per_row = [np.repeat(arrays[name].astype(np.float64), weight.group_size, axis=1) for name in ("scales", "biases")]
    return (per_row[0] * q + per_row[1]).T


_FORM = Form(_shapes, _convert, _decode, {"weight": 0, "scales": 0, "biases": 0})


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    kinds = {
        n: (linear.packed.group_size, linear.packed.bits)
        for n, linear, _ in named_linears(model)
        if linear.is_quantized
    }
    (group_size, bits), _ = Counter(kinds.values()).most_common(1)[0]
    said: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for name, kind in kinds.items():
        if kind != (group_size, bits):
            said[name] = {"group_size": kind[0], "bits": kind[1], "mode": "affine"}
    # mlx-lm reads the first; the second is what it writes beside it.
    settings = _config(model) | {"quantization": said, "quantization_config": said}
    write_folder(model, source, folder, record, progress, form=_FORM, settings=settings, kind="mlx")


def _config(model: Decoder) -> dict[str, Any]:
    """What mlx-lm looks for under these names alone, and has values of its own for where it finds nothing."""
    config = model.config
    if config.model_type == "qwen2" and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ConfigError(
            f"--target mlx: head_dim is {config.head_dim}; for Qwen2 mlx-lm knows only hidden_size / heads. "
            "Use --target gptq."
        )
    scaling = None if config.rope_scaling is None else {"rope_type": "llama3", **vars(config.rope_scaling)}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.rms_norm_eps,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": model.lm_head is None,
    }


MLX = Target(
    name="mlx",
    title="MLX affine groups, float32 scales and biases",
    group_sizes=(32, 64, 128),
    act_order=False,
    partial=False,
    offset="in the biases",
    exact="yes",
    runtimes=("mlx-lm",),
    size=lambda model, _: form_size(model, _FORM),
    write=_write,
)
