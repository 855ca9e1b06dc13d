"""GPTQ: what came in, with other integers; the one target that keeps a base's files byte for byte.

Source: :mod:`convert.gptq`, :mod:`convert.hf`.
"""

from __future__ import annotations

from pathlib import Path

from convert.gptq import fill_gptq
from convert.hf import checkpoint_bytes, fill_checkpoint
from convert.offset import offset_bytes
from convert.targets.peft import record_offsets
from convert.targets.target import Record, Source, Target
from lotaqaf_jax.models import Decoder

__all__ = ["GPTQ"]


def _size(model: Decoder, source: Source) -> int:
    if source.base is None:
        return checkpoint_bytes(model)
    return source.base.nbytes + offset_bytes(model)


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    if source.base is None:
        fill_checkpoint(
            model, folder, config=source.config, tokenizer_from=source.folder, model_name=source.name, progress=progress
        )
    else:
        fill_gptq(model, source.base, folder, model_name=source.name, progress=progress)
    record_offsets(model, record)


GPTQ = Target(
    name="gptq",
    title="GPTQ, as the base",
    bits=(2, 3, 4, 8),
    group_sizes=None,
    act_order=True,
    partial=True,
    multiple=1,
    offset="beside, as a PEFT LoRA in offset_adapter/",
    exact="yes",
    runtimes=("GPTQModel", "transformers", "SGLang", "vLLM (4 and 8 bit, symmetric)"),
    size=_size,
    write=_write,
)
