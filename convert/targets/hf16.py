"""16 bit: every weight dequantised, for runtimes that read no quantised model at all.

    weight   (out, in)    W rounded once to bfloat16 where the model's embedding has that type, else to float16

Source: Hugging Face checkpoints of Llama and Qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.targets.host import HostWeight
from convert.targets.target import Record, Source, Target
from convert.targets.tensors import Form, form_size, write_folder
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.quant import QuantizedWeight

__all__ = ["HF16"]


def _form(dtype: Any) -> Form:
    def shapes(weight: QuantizedWeight) -> dict[str, tuple[Any, tuple[int, ...]]]:
        return {"weight": (dtype, weight.shape[::-1])}

    def convert(weight: HostWeight) -> dict[str, np.ndarray]:
        # Beyond float16's largest number it becomes infinite, which is refused as an error, not met with a warning.
        with np.errstate(over="ignore"):
            return {"weight": weight.values().T.astype(dtype)}

    def decode(arrays: Mapping[str, np.ndarray], _: HostWeight) -> np.ndarray:
        return arrays["weight"].T.astype(np.float64)

    return Form(shapes, convert, decode, {"weight": 0})


def _type(model: Decoder) -> np.dtype[Any]:
    wide = model.embed_tokens.weight.get_value().dtype
    return np.dtype(jnp.bfloat16 if wide == jnp.bfloat16 else np.float16)


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    dtype = _type(model)
    key = "torch_dtype" if "torch_dtype" in source.config else "dtype"
    write_folder(model, source, folder, record, progress, form=_form(dtype), settings={key: dtype.name})


HF16 = Target(
    name="hf16",
    title="16-bit weights",
    offset="in the weights",
    exact="no: rounded to 11 bits (float16) or 8 (bfloat16)",
    runtimes=("any that reads Hugging Face checkpoints",),
    size=lambda model, _: form_size(model, _form(_type(model))),
    write=_write,
)
