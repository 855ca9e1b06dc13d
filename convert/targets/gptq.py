"""GPTQ, and the base's own format, whichever it is: what came in, with other integers, all else byte for byte.

Source: :mod:`convert.gptq`, :mod:`convert.hf`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from convert.gptq import fill_gptq
from convert.hf import checkpoint_bytes, fill_checkpoint
from convert.hf_config import complete_config
from convert.offset import offset_bytes
from convert.targets.peft import record_offsets
from convert.targets.target import Record, Source, Target
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.quant.folder import CheckpointFolder

__all__ = ["BASE", "GPTQ"]


def _kept(source: Source) -> CheckpointFolder | None:
    """The base, where it is GPTQ, so that its files can be kept."""
    return source.base if source.base is not None and source.base.format == "gptq" else None


def _size(model: Decoder, source: Source) -> int:
    base = _kept(source)
    return checkpoint_bytes(model) if base is None else base.nbytes + offset_bytes(model)


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    if _kept(source) is not None:
        _write_base(model, source, folder, record, progress)
        return
    config = source.config if source.base is None else complete_config(model, source.plain_config)
    fill_checkpoint(
        model, folder, config=config, tokenizer_from=source.folder, model_name=source.name, progress=progress
    )
    record_offsets(model, record)


def _write_base(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    if source.base is None:
        raise ConfigError("--target base: there is no base whose format it could be. Use --target gptq.")
    fill_gptq(model, source.base, folder, model_name=source.name, progress=progress)
    record_offsets(model, record)


GPTQ = Target(
    name="gptq",
    title="GPTQ",
    offset="beside, as a PEFT LoRA in offset_adapter/",
    exact="yes",
    runtimes=("GPTQModel", "transformers", "SGLang", "vLLM (4 and 8 bit, symmetric)"),
    size=_size,
    write=_write,
)
BASE = dataclasses.replace(
    GPTQ,
    name="base",
    title="the base's own format",
    runtimes=("what loads the base",),
    size=lambda model, source: (0 if source.base is None else source.base.nbytes) + offset_bytes(model),
    write=_write_base,
)
