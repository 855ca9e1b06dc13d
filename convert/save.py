"""``save_pretrained``: a model out, in the format that is asked for; and the whole way from adapter model to proof."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.card import CardFacts, write_card
from convert.gptq import fill_gptq
from convert.hf_config import complete_config
from convert.offset import offset_bytes
from convert.targets import EXACT, TARGETS, ExportReport, Source, Target, check_fit
from convert.tensors import refuse_adapters
from convert.verify import Report, moves, verify
from convert.writing import new_folder
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, merge
from lotaqaf_jax.parallel.processes import barrier
from lotaqaf_jax.quant.folder import CheckpointFolder, read_json

__all__ = ["check_target", "merge_and_save", "save_pretrained"]


def check_target(target: str) -> Target:
    """The export target of that name.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    if target not in TARGETS:
        raise ConfigError(f"--target: found {target!r}, expected one of {', '.join(TARGETS)}.")
    return TARGETS[target]


def save_pretrained(
    model: Decoder,
    directory: str | Path,
    *,
    base: CheckpointFolder | str | Path | None = None,
    target: str = "gptq",
    allow_lossy: bool = False,
    tokenizer_from: str | Path | None = None,
    training: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Write a merged model as a folder that other people's software loads.

    Target "base" is the folder of ``base``, in its format, with only packed integers changed
    (:func:`convert.export_gptq`), and "gptq" the same where that is GPTQ; elsewhere, and without a base, it is a whole
    checkpoint made from the model. The other targets hold the same weights in another form (docs/export.md has them in
    one table). What is written is decoded again and compared with the model, weight by weight in float64: a target that
    is off by more than 2**-15 of a step of the grid is refused, and nothing written, unless ``allow_lossy``.

    Args:
        model: the decoder, its adapters merged.
        directory: the folder to write.
        base: the checkpoint that the model was loaded from; tokenizer and generation files are copied from it.
        target: a name of :data:`convert.TARGETS`.
        allow_lossy: write what the target cannot hold exactly, too.
        tokenizer_from: in place of ``base``, a folder whose config.json, tokenizer and generation files are taken.
        training: lines for the card (README.md) on how the model was trained.
        overwrite: replace a checkpoint that is there.
        progress: show progress bars when it takes longer than a second.

    Returns:
        The largest error of every quantised module, and with a ``base`` how many integers moved.

    Raises:
        ConfigError: unknown target, one that has no room for the model or would lose something, adapters that are not
            merged, or a folder that is not empty.
        CheckpointError: the model does not come from ``base``.
        OutputError: the folder cannot be written.
    """
    chosen = check_target(target)
    refuse_adapters(model)
    check_fit(chosen, model)
    source = _source(model, directory, base, tokenizer_from)
    errors: dict[str, float] = {}

    def record(name: str, error: float) -> None:
        errors[name] = error
        if error > EXACT and not (allow_lossy and math.isfinite(error)):
            raise ConfigError(_refusal(chosen, name, error))

    sources = [] if source.folder is None else [source.folder]
    with new_folder(directory, overwrite=overwrite, needed=chosen.size(model, source), sources=sources) as folder:
        chosen.write(model, source, folder, record, progress)
        compared = (0, 0, 0) if source.base is None else moves(source.base, model)
        report = ExportReport(target, errors, *compared)
        write_card(folder, _facts(directory, source, chosen, training, report))
    return report


def _source(
    model: Decoder, directory: str | Path, base: CheckpointFolder | str | Path | None, tokenizer_from: str | Path | None
) -> Source:
    if base is not None:
        opened = base if isinstance(base, CheckpointFolder) else CheckpointFolder(base)
        return Source(opened, opened.config, opened.path, str(directory))
    folder = None if tokenizer_from is None else Path(tokenizer_from)
    said = read_json(folder / "config.json") if folder is not None and (folder / "config.json").is_file() else None
    return Source(None, complete_config(model, said), folder, str(directory))


def _facts(
    directory: str | Path, source: Source, target: Target, training: Sequence[str], report: ExportReport | Report
) -> CardFacts:
    config = source.config
    base = str(config.get("_name_or_path") or (source.folder.name if source.folder else config.get("model_type")))
    title = target.title
    if target.name == "base" and source.base is not None:
        title = {"gptq": "GPTQ", "awq": "AWQ", "mlx": "MLX"}.get(source.base.format, source.base.format)
    return CardFacts(Path(directory).name, base, title, training, str(report).splitlines())


def _refusal(target: Target, name: str, error: float) -> str:
    if not math.isfinite(error):
        return f"--target {target.name}: {name} has weights beyond its range. Use another target."
    held = [other.name for other in TARGETS.values() if other.exact == "yes" and other.name not in ("base", "peft")]
    return (
        f"--target {target.name}: {name} would be off by up to {error:.4f} steps of its grid ({target.exact}). "
        f"Add --allow-lossy to write it all the same, or use one of: {', '.join(held)}."
    )


def merge_and_save(
    model: Decoder,
    directory: str | Path,
    *,
    base: CheckpointFolder,
    input_ids: np.ndarray | None = None,
    seed: int = 0,
    training: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Merge, write in the base's format and verify; the folder appears at ``directory`` only if every check passes.

    Args:
        model: the adapter model, loaded from ``base``.
        directory: the folder to write.
        base: the checkpoint.
        input_ids: (batch, length) tokens to compare logits on; None for random ones.
        seed: seed of the random ones.
        training: lines for the card (README.md) on how the model was trained.
        overwrite: replace a checkpoint that is there.
        progress: show progress bars when it takes longer than a second.

    Returns:
        The report of :func:`convert.verify`.

    Raises:
        VerificationError: a check failed; nothing is left at ``directory``.
        ConfigError, CheckpointError, OutputError: as :func:`save_pretrained`.
    """
    merged = merge(model)
    needed = base.nbytes + offset_bytes(merged)
    with new_folder(directory, overwrite=overwrite, needed=needed, sources=[base.path]) as folder:
        fill_gptq(merged, base, folder, model_name=str(directory), progress=progress)
        del merged
        barrier("words are written")
        report = verify(base, folder, model=model, input_ids=input_ids, seed=seed, progress=progress)
        source = Source(base, base.config, base.path, str(directory))
        write_card(folder, _facts(directory, source, TARGETS["base"], training, report))
        return report
