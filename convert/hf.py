"""Decoder -> Hugging Face folder: a whole checkpoint, dense or GPTQ, written from the model alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.hf_config import complete_config
from convert.offset import OFFSET_FOLDER, has_offsets, offset_bytes, write_offsets
from convert.shards import shards_of, write_index
from convert.tensors import HFTensor, hf_tensors
from convert.writing import new_folder, write_json, write_safetensors
from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.parallel.processes import is_main
from lotaqaf_jax.quant.config import QuantizationConfig

__all__ = ["checkpoint_bytes", "copy_companions", "fill_checkpoint", "write_checkpoint"]

# What goes with the weights: configs, tokenizer, chat template, code, licences. Everything else (weights in other
# formats, optimizer states, caches, the card of the model that it was) stays behind.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
_LEFT_BEHIND = (
    "*.index.json",
    "trainer_state.json",
    "adapter_config.json",
    "manifest.json",
    "all_results.json",
    "quantize_log.json",
)


def copy_companions(source: Path, folder: Path, *, skip: tuple[str, ...] = ()) -> list[Path]:
    """Copy the files that go with a checkpoint's weights; only from the top of ``source``, byte for byte.

    Args:
        source: the checkpoint or tokenizer folder.
        folder: where to.
        skip: names that are not to be copied.

    Returns:
        The copies.
    """
    copies = []
    for path in sorted(source.iterdir()):
        wanted = any(path.match(pattern) for pattern in _COMPANIONS)
        if wanted and path.is_file() and path.name not in skip and not any(path.match(p) for p in _LEFT_BEHIND):
            copies.append(Path(shutil.copyfile(path, folder / path.name)))
    return copies


def write_checkpoint(
    model: Decoder,
    directory: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write a model as a Hugging Face folder that transformers, GPTQModel and :func:`lotaqaf_jax.load_pretrained` read.

    Dense weights are written in their stored type, quantised ones as GPTQ: packed words as they are, zero points in
    the convention of the format. A model that was merged with an offset gets it beside, see :mod:`convert.offset`.

    Args:
        model: the decoder, its adapters merged.
        directory: the folder to write.
        config: keys of config.json, taken as they are (the ids of special tokens, or a whole config); what they do
            not say is derived from the model. A ``quantization_config`` among them must describe the weights; without
            one, asymmetric weights are written as ``gptq_v2``.
        tokenizer_from: a folder whose tokenizer, generation and template files are copied.
        overwrite: replace a checkpoint that is there.
        progress: show a progress bar when it takes longer than a second.

    Raises:
        ConfigError: ``config`` contradicts the model, adapters are not merged, or the folder is not empty.
        CheckpointError: ``tokenizer_from`` is no folder.
        OutputError: the folder cannot be written.

    Source: GPTQ on disk; safetensors shards of at most 5 GB with an index, as transformers writes them.
    """
    if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
        raise CheckpointError(f"tokenizer_from: {tokenizer_from}: no such folder. Pass one with tokenizer.json in it.")
    written = complete_config(model, config)
    source = None if tokenizer_from is None else Path(tokenizer_from)
    sources = [] if source is None else [source]
    with new_folder(directory, overwrite=overwrite, needed=checkpoint_bytes(model), sources=sources) as folder:
        fill_checkpoint(
            model, folder, config=written, tokenizer_from=source, model_name=str(directory), progress=progress
        )


def checkpoint_bytes(model: Decoder) -> int:
    """Bytes that :func:`write_checkpoint` writes, configs and tokenizer aside."""
    return sum(tensor.nbytes for tensor in hf_tensors(model)) + offset_bytes(model)


def fill_checkpoint(
    model: Decoder,
    folder: Path,
    *,
    config: Mapping[str, Any],
    tokenizer_from: Path | None,
    model_name: str,
    progress: bool = True,
) -> None:
    """The files of :func:`write_checkpoint`, into an empty folder.

    Args:
        model: the decoder.
        folder: an empty folder.
        config: the whole config.json.
        tokenizer_from: where tokenizer, generation and template files are.
        model_name: where the folder will be, for the config of the offset adapter.
        progress: show a progress bar when it takes longer than a second.
    """
    said = config.get("quantization_config")
    form = None if said is None else QuantizationConfig.from_hf(said).checkpoint_format
    if is_main():
        if tokenizer_from is not None:
            copy_companions(tokenizer_from, folder, skip=("config.json", "quantize_config.json"))
        write_json(folder / "config.json", config)
        if said is not None:
            write_json(folder / "quantize_config.json", said)
    _write_shards(folder, list(hf_tensors(model, form)), progress)
    if has_offsets(model):
        write_offsets(model, folder / OFFSET_FOLDER, model_name=model_name)


def _write_shards(folder: Path, tensors: list[HFTensor], progress: bool) -> None:
    by_name = {tensor.name: tensor for tensor in tensors}
    shards = shards_of(([tensor.name], tensor.nbytes) for tensor in tensors)
    total = sum(tensor.nbytes for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=1.0, disable=not progress) as bar:

        def read(name: str) -> np.ndarray:
            bar.update(by_name[name].nbytes)
            return by_name[name].read()

        for file, names in shards.items():
            # transformers refuses a file whose metadata does not say what wrote it.
            shapes = {name: (by_name[name].dtype, by_name[name].shape) for name in names}
            write_safetensors(folder / file, shapes, read, {"format": "pt"})
    write_index(folder, shards, total)
