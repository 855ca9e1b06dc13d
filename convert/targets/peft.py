"""PEFT: the offset of a merged model alone, as a LoRA for the folder that target gptq writes.

All its modules have one rank, and the folder has no other file of tensors, as SGLang wants it; what target gptq writes
beside the model is about half as large.

Source: :mod:`convert.offset`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convert.offset import fill_lora, has_offsets, lora_bytes, lora_pair
from convert.targets.target import Record, Source, Target
from convert.tensors import quantized_weights
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.parallel.processes import fetch

__all__ = ["PEFT", "record_offsets"]


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    if not has_offsets(model):
        raise ConfigError(
            "--target peft: the model has no offset, and its integers are no LoRA. Use --target gptq, which is the "
            "whole model."
        )
    fill_lora(model, folder, model_name=source.name, one_rank=True)
    record_offsets(model, record)


def record_offsets(model: Decoder, record: Record) -> None:
    """Tell ``record`` how far the LoRA that :mod:`convert.offset` writes is from the offset of every weight."""
    for name, weight in quantized_weights(model):
        error = 0.0
        if weight.offset is not None:
            step, offset = fetch(weight.scales).astype(np.float64), fetch(weight.offset).astype(np.float64)
            missed = np.abs(lora_pair(weight)[1].T.astype(np.float64) - step * offset)
            error = float(np.max(np.divide(missed, np.abs(step), out=np.zeros_like(step), where=step != 0)))
        record(name, error)


PEFT = Target(
    name="peft",
    title="the offset alone, as a PEFT LoRA of one rank, for what gptq writes",
    offset="all that there is",
    exact="yes",
    runtimes=("PEFT on transformers", "GPTQModel", "vLLM", "SGLang"),
    size=lambda model, _: lora_bytes(model, one_rank=True),
    write=_write,
)
