"""Merged decoder -> a folder like its base, in which only packed integers changed.

Each shard of the base is copied, and then only the bytes of the words that moved are overwritten in the copy. Zero
points, scales, group index, names, shard layout and everything in 16 bit therefore stay what they were byte for byte,
whatever the base's writer did with them. The configs gain our name in ``meta.quantizer`` and nothing else. A base in
another format (:mod:`lotaqaf_jax.quant.formats`) stays in it: its words are overwritten in its own order, and its
configs, which have no such place, are copied.

Source: GPTQ on disk, as GPTQModel 7.6 and transformers 5 read it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.hf import copy_companions
from convert.hf_config import WRITER
from convert.offset import OFFSET_FOLDER, has_offsets, offset_bytes, write_offsets
from convert.tensors import quantized_weights, refuse_adapters
from convert.writing import new_folder
from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.parallel.processes import fetch, is_main
from lotaqaf_jax.quant.folder import INDEX, CheckpointFolder, read_json

__all__ = ["CONFIG_FILES", "export_gptq", "fill_gptq", "read_config", "signed"]

CONFIG_FILES = ("config.json", "quantize_config.json")


def export_gptq(
    model: Decoder,
    base: CheckpointFolder,
    directory: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write a merged model: the base folder with its words replaced, offsets beside in ``offset_adapter/``.

    Args:
        model: the merged decoder, loaded from ``base``.
        base: the checkpoint, GPTQ or another format that can be read; the new folder is in the same.
        directory: the folder to write.
        overwrite: replace a checkpoint that is there.
        progress: show a progress bar when it takes longer than a second.

    Raises:
        ConfigError: adapters are not merged, or the folder is not empty or overlaps the base.
        CheckpointError: the model does not come from ``base``.
        OutputError: the folder cannot be written.
    """
    refuse_adapters(model)
    needed = base.nbytes + offset_bytes(model)
    with new_folder(directory, overwrite=overwrite, needed=needed, sources=[base.path]) as folder:
        fill_gptq(model, base, folder, model_name=str(directory), progress=progress)


def fill_gptq(model: Decoder, base: CheckpointFolder, folder: Path, *, model_name: str, progress: bool = True) -> None:
    """The files of :func:`export_gptq`, into an empty folder.

    Args:
        model: the merged decoder.
        base: the checkpoint that it was loaded from.
        folder: an empty folder.
        model_name: where the folder will be, for the config of the offset adapter.
        progress: show a progress bar when it takes longer than a second.
    """
    if is_main():
        _copy_base(base, folder, progress)
    with tqdm(
        total=len(base.quantized_modules), unit="module", desc="writing words", delay=1.0, disable=not progress
    ) as bar:
        for name, weight in quantized_weights(model):
            _check_base(base, name, fetch(weight.scales))
            expected = base.tensors[f"{name}.qweight"].shape
            words = fetch(weight.qweight)
            if words.shape != expected:
                raise CheckpointError(f"{name}.qweight: the model has {words.shape}, {base.path} has {expected}.")
            if is_main() and not np.array_equal(words, base.read(f"{name}.qweight")):
                entry = base.stored[base.words_name(name)]
                stored = np.ascontiguousarray(base.to_stored(name, words))
                assert (stored.dtype, stored.shape) == (entry.dtype, entry.shape)
                with (folder / entry.file.name).open("r+b") as file:
                    file.seek(entry.start)
                    file.write(stored.reshape(-1).view(np.uint8).data)
            bar.update()
    if has_offsets(model):
        write_offsets(model, folder / OFFSET_FOLDER, model_name=model_name)


def _copy_base(base: CheckpointFolder, folder: Path, progress: bool) -> None:
    """Everything of the base, the configs with our name."""
    copy_companions(base.path, folder, skip=CONFIG_FILES)
    if (base.path / INDEX).is_file():
        shutil.copyfile(base.path / INDEX, folder / INDEX)
    for name in CONFIG_FILES:
        if (base.path / name).is_file():
            text = (base.path / name).read_text(encoding="utf-8")
            if base.format == "gptq":
                text = signed(text, nested=name == "config.json")
            (folder / name).write_text(text, encoding="utf-8")
    with tqdm(total=base.nbytes, unit="B", unit_scale=True, desc="writing", delay=1.0, disable=not progress) as bar:
        for shard in base.shards:
            shutil.copyfile(shard, folder / shard.name)
            bar.update(shard.stat().st_size)


def _check_base(base: CheckpointFolder, name: str, scales: np.ndarray) -> None:
    """Words mean something only with the scales that they were made for."""
    if f"{name}.qweight" not in base.tensors or not np.array_equal(scales, base.read(f"{name}.scales")):
        raise CheckpointError(
            f"{name}: the model's scales are not those of {base.path}. Pass the folder that the model was loaded from."
        )


def signed(text: str, *, nested: bool) -> str:
    """A config file with our name appended to ``meta.quantizer``; order of keys and indentation stay.

    GPTQModel reads asymmetric v1 weights only where this list names gptqmodel of at least 0.9.0, so what is there is
    kept. A file without ``meta`` (those of Qwen2.5 on the hub, which are symmetric) gets a list with our name alone:
    we cannot vouch that GPTQModel wrote the zero points, and where it refuses the base it will refuse the merged model.

    Args:
        text: the file.
        nested: whether the quantisation config sits under ``quantization_config``, as in config.json.

    Returns:
        The new text; the same text where a config.json holds no ``quantization_config``.
    """
    parsed: dict[str, Any] = json.loads(text)
    config = parsed.get("quantization_config") if nested else parsed
    if config is None:
        return text
    meta = config.get("meta") or {}
    writers = meta.get("quantizer") or []
    writers = [writers] if isinstance(writers, str) else list(writers)
    if not writers or writers[-1] != WRITER:
        writers.append(WRITER)
    config["meta"] = meta | {"quantizer": writers}
    indent = re.search(r"\n([ \t]+)\S", text)
    written = json.dumps(parsed, indent=indent[1] if indent else None, ensure_ascii=text.isascii())
    return written + ("\n" if text.endswith("\n") else "")


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A config file with ``meta.quantizer`` taken out, to compare what is left; {} where there is none."""
    if not (folder / name).is_file():
        return {}
    parsed = read_json(folder / name)
    config = parsed.get("quantization_config") if name == "config.json" else parsed
    if isinstance(config, dict):
        meta = {key: value for key, value in (config.get("meta") or {}).items() if key != "quantizer"}
        config.pop("meta", None)
        if meta:
            config["meta"] = meta
    return parsed
