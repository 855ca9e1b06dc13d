"""``save_pretrained``: a model out, in the format that is asked for; and the whole way from adapter model to proof."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convert.gptq import export_gptq, fill_gptq
from convert.hf import write_checkpoint
from convert.offset import offset_bytes
from convert.verify import Report, verify
from convert.writing import new_folder
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, merge
from lotaqaf_jax.parallel.processes import barrier
from lotaqaf_jax.quant.folder import CheckpointFolder

__all__ = ["TARGETS", "check_target", "merge_and_save", "save_pretrained"]

TARGETS = ("gptq",)


def check_target(target: str) -> None:
    """Refuse an export target that is not known.

    Raises:
        ConfigError: names those that are.
    """
    if target not in TARGETS:
        raise ConfigError(f"--target: found {target!r}, expected one of {', '.join(TARGETS)}.")


def save_pretrained(
    model: Decoder,
    directory: str | Path,
    *,
    base: CheckpointFolder | str | Path | None = None,
    target: str = "gptq",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write a merged model as a folder that other people's software loads.

    With ``base``, the folder is the base's with only ``qweight`` changed (:func:`convert.export_gptq`); without one, a
    whole checkpoint is written from the model alone (:func:`convert.write_checkpoint`), with neither tokenizer nor
    generation files.

    Args:
        model: the decoder, its adapters merged.
        directory: the folder to write.
        base: the checkpoint that the model was loaded from.
        target: the format; "gptq".
        overwrite: replace a checkpoint that is there.
        progress: show progress bars when it takes longer than a second.

    Raises:
        ConfigError: unknown target, adapters that are not merged, or a folder that is not empty.
        CheckpointError: the model does not come from ``base``.
        OutputError: the folder cannot be written.
    """
    check_target(target)
    if base is None:
        write_checkpoint(model, directory, overwrite=overwrite, progress=progress)
        return
    folder = base if isinstance(base, CheckpointFolder) else CheckpointFolder(base)
    export_gptq(model, folder, directory, overwrite=overwrite, progress=progress)


def merge_and_save(
    model: Decoder,
    directory: str | Path,
    *,
    base: CheckpointFolder,
    target: str = "gptq",
    input_ids: np.ndarray | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Merge, write and verify; the folder appears at ``directory`` only if every check passes.

    Args:
        model: the adapter model, loaded from ``base``.
        directory: the folder to write.
        base: the checkpoint.
        target: the format; "gptq".
        input_ids: (batch, length) tokens to compare logits on; None for random ones.
        seed: seed of the random ones.
        overwrite: replace a checkpoint that is there.
        progress: show progress bars when it takes longer than a second.

    Returns:
        The report of :func:`convert.verify`.

    Raises:
        VerificationError: a check failed; nothing is left at ``directory``.
        ConfigError, CheckpointError, OutputError: as :func:`save_pretrained`.
    """
    check_target(target)
    merged = merge(model)
    needed = base.nbytes + offset_bytes(merged)
    with new_folder(directory, overwrite=overwrite, needed=needed, sources=[base.path]) as folder:
        fill_gptq(merged, base, folder, model_name=str(directory), progress=progress)
        del merged
        barrier("words are written")
        return verify(base, folder, model=model, input_ids=input_ids, seed=seed, progress=progress)
