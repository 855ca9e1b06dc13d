"""16-bit folder -> GPTQ folder, one block of the model at a time.

For every decoder block in turn: its 16-bit weights go from the memory-mapped shards to the device, its projections are
quantised (:mod:`convert.block`), their packed tensors are written to their places in the new shards, and the outputs of
the *quantised* block become the inputs of the next. So beyond the page cache of the shards, with n samples of l tokens,
hidden size h and d bytes for a value of ``dtype``:

    on the device  one block's weights at d bytes, and for the projection at work (in, out): the Hessian and its factor,
                   2 * in^2 * 4 bytes; about 6 copies of its weight in float32; the activations of 4096 tokens (or one
                   sample, if that is longer)
    on the host    n * l * h * d bytes of activations; 3 * in^2 * 8 bytes while a Hessian is factorised; one tensor

whatever the number of blocks. On a CPU device and host are the same memory.

Embedding, norms, biases and head are copied byte for byte. Every tensor stays in the shard that it is in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convert.block import GPTQSettings, Stream, quantize_block
from convert.calibration import calibration_samples, check_samples
from convert.hf import copy_companions
from convert.hf_config import writers
from convert.writing import TensorFile, new_folder, write_json
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import DecoderConfig, local_folder
from lotaqaf_jax.models.loading import load_block, read_spec
from lotaqaf_jax.models.pretrained import default_dtype, load_tokenizer
from lotaqaf_jax.models.spec import projection_shapes
from lotaqaf_jax.quant import encode_zeros, pack, packed_size
from lotaqaf_jax.quant.folder import INDEX, CheckpointFolder
from lotaqaf_jax.quant.gptq import GPTQResult
from lotaqaf_jax.quant.weight import group_count
from lotaqaf_jax.quant.zeros import check_format

__all__ = ["LOG", "LayerError", "QuantizeReport", "quantize"]

LOG = "quantize_log.json"
"""In the new folder: settings, calibration, and the error of every projection."""

_LENGTH = 2048  # tokens of a sample, where the model has so many positions


@dataclasses.dataclass(frozen=True)
class LayerError:
    """What quantising one projection lost.

    Attributes:
        name: of the module.
        loss: trace(E^T H E), H = 2/rows * x^T x with the inputs x it gets: twice the mean square of what a row of its
            outputs lost, summed over the outputs.
        error: that loss as a share of trace(W^T H W), the same of the outputs themselves.
        seconds: since the projection before it was done.
    """

    name: str
    loss: float
    error: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize` did; ``str()`` of it is a page to read.

    Attributes:
        layers: every projection, in the order of the model.
        samples: calibration samples.
        tokens: calibration tokens.
        bytes_before: bytes of the 16-bit tensors.
        bytes_after: bytes of the quantised model's tensors.
        seconds: of the whole.
    """

    layers: tuple[LayerError, ...]
    samples: int
    tokens: int
    bytes_before: int
    bytes_after: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report for a JSON file."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A table over projections of one kind: mean and largest error, and the layer that has it."""
        kinds: dict[str, list[LayerError]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer)
        lines = ["module      mean error    largest   of"]
        for kind, found in kinds.items():
            worst = max(found, key=lambda layer: layer.error)
            mean = sum(layer.error for layer in found) / len(found)
            lines.append(f"{kind:10} {mean:>11.4%} {worst.error:>10.4%}   {worst.name}")
        lines += [
            f"calibration  {self.samples} samples, {self.tokens:,} tokens",
            f"size         {self.bytes_before / 1e6:,.1f} MB before, {self.bytes_after / 1e6:,.1f} MB after",
            f"time         {self.seconds:.0f} s",
        ]
        return "\n".join(lines)


def quantize(
    model: str | Path,
    directory: str | Path,
    *,
    calibration: str | Path | Sequence[Sequence[int] | np.ndarray],
    bits: int = 4,
    group_size: int = 64,
    sym: bool = False,
    desc_act: bool = False,
    act_group_aware: bool = True,
    damp_percent: float = 0.05,
    grid_search: bool = True,
    checkpoint_format: str = "gptq",
    samples: int = 256,
    length: int | None = None,
    seed: int = 0,
    dtype: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Quantise the projections of a Llama or Qwen2 model with GPTQ.

        W^[i, j] = scales[g_idx[i], j] * (integers[i, j] - zeros[g_idx[i], j])

    chosen by :func:`lotaqaf_jax.quant.gptq.quantize_layer` for the inputs that the calibration text makes in the model
    quantised so far.

    Args:
        model: a folder or hub name with weights in float16, bfloat16 or float32.
        directory: the folder to write; it appears when it is whole.
        calibration: a dataset, see :mod:`convert.calibration`; or the samples themselves, token ids of any lengths.
        bits: 2, 3, 4 or 8.
        group_size: input rows with a common scale and zero point; -1 for all.
        sym: zero point 2^(bits-1) everywhere, else a zero point for each group.
        desc_act: act-order, rows by the size of their inputs; groups are then scattered (g_idx).
        act_group_aware: without ``desc_act``, act-order that keeps groups whole; g_idx stays i // group_size.
        damp_percent: added to the diagonal of a Hessian, as a share of its mean.
        grid_search: narrow the range of a group where that lowers its error.
        checkpoint_format: how zero points are stored, "gptq" (v1) or "gptq_v2". Whatever reads v2 reads v1, and some
            software reads v1 only; see :func:`convert.hf_config.writers` for what that takes of an asymmetric model.
        samples: of a dataset, how many.
        length: of a dataset, tokens of each; None for 2048, or as many positions as the model has.
        seed: of a dataset, which rows.
        dtype: the type that activations are computed in; None for float32 on a CPU and bfloat16 elsewhere.
        overwrite: replace a checkpoint that is there.
        progress: show a progress bar.

    Returns:
        The error of every projection, which is also in the folder's ``quantize_log.json``.

    Raises:
        ConfigError: a setting out of range, an unsupported or already quantised model, a folder that is not empty.
        CheckpointError: a checkpoint that is missing, damaged, or does not fit its config.
        DataError: calibration data that cannot be used.
        OutputError: the folder cannot be written.

    Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323); GPTQ on disk.
    """
    begun = time.perf_counter()
    settings = GPTQSettings(bits, group_size, sym, desc_act, act_group_aware, damp_percent, grid_search)
    form = check_format(checkpoint_format, "--checkpoint_format")
    folder = CheckpointFolder(local_folder(model))
    config = _dense_config(folder)
    dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
    positions = config.max_position_embeddings
    length = min(_LENGTH, positions) if length is None else length
    if length > positions:
        raise ConfigError(f"--length: found {length}, the model has {positions} positions (max_position_embeddings).")
    shards = _shards(folder, config, settings)
    needed = sum(_nbytes(*tensor) for shard in shards.values() for tensor in shard.values())
    with new_folder(directory, overwrite=overwrite, needed=needed, sources=[folder.path]) as out:
        of_text: dict[str, Any] = {}
        given = calibration
        if isinstance(given, str | Path):
            of_text = {"calibration": str(given), "samples": samples, "length": length, "seed": seed}
            tokenizer = load_tokenizer(folder.path)
            given = calibration_samples(given, tokenizer, samples=samples, length=length, seed=seed)
        ids = check_samples(given, config.vocab_size, positions)
        with _TensorFiles(out, shards) as files:
            for name in files.where.keys() & folder.tensors.keys():
                files.write(name, folder.read(name))
            layers = tuple(_quantize_blocks(folder, config, settings, form, ids, dtype, files, progress))
        seconds = time.perf_counter() - begun
        report = QuantizeReport(layers, len(ids), sum(map(len, ids)), folder.nbytes, needed, seconds)
        copy_companions(folder.path, out, skip=("config.json", "quantize_config.json"))
        written = quantization_config(settings, form)
        write_json(out / "config.json", folder.config | {"quantization_config": written})
        write_json(out / "quantize_config.json", written)
        if (folder.path / INDEX).is_file():
            where = dict(sorted(files.where.items()))
            write_json(out / INDEX, {"metadata": {"total_size": needed}, "weight_map": where})
        write_json(out / LOG, {"settings": dataclasses.asdict(settings) | of_text, **report.to_dict()})
    return report


def _dense_config(folder: CheckpointFolder) -> DecoderConfig:
    """The config of a checkpoint that can be quantised, its tensors checked against it."""
    if folder.quantization is not None or any(name.endswith(".qweight") for name in folder.tensors):
        raise ConfigError(
            f"{folder.path}: is quantised already, and quantising twice loses twice. Pass the 16-bit model."
        )
    config = DecoderConfig.from_hf(folder.config)
    read_spec(folder, config)
    return config


def quantization_config(settings: GPTQSettings, checkpoint_format: str) -> dict[str, Any]:
    """The ``quantization_config`` of what :func:`quantize` writes, by the keys that GPTQModel and transformers read."""
    return {
        "bits": settings.bits,
        "checkpoint_format": checkpoint_format,
        "desc_act": settings.desc_act,
        "group_size": settings.group_size,
        "lm_head": False,
        "meta": {
            "quantizer": writers(checkpoint_format, settings.sym),
            "act_group_aware": settings.together is not None,
            "damp_percent": settings.damp_percent,
            "true_sequential": True,
        },
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": settings.sym,
    }


_Tensors = dict[str, tuple[Any, tuple[int, ...]]]


def _nbytes(dtype: Any, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))


def _shards(folder: CheckpointFolder, config: DecoderConfig, settings: GPTQSettings) -> dict[str, _Tensors]:
    """Type and shape of every tensor to write, by the file that it goes to: that of the weight that it is made from."""
    shapes = projection_shapes(config)
    made = {f"model.layers.{i}.{path}": shapes[path] for i in range(config.num_hidden_layers) for path in shapes}
    shards: dict[str, _Tensors] = {}
    for name, entry in folder.stored.items():
        shard = shards.setdefault(entry.file.name, {})
        module = name.removesuffix(".weight")
        if module == name or module not in made:
            shard[name] = (entry.dtype, entry.shape)
            continue
        n_in, n_out, _ = made[module]
        groups = group_count(n_in, settings.group_size)
        shard[f"{module}.qweight"] = (np.int32, (packed_size(n_in, settings.bits), n_out))
        shard[f"{module}.qzeros"] = (np.int32, (groups, packed_size(n_out, settings.bits)))
        shard[f"{module}.scales"] = (np.float16, (groups, n_out))
        shard[f"{module}.g_idx"] = (np.int32, (n_in,))
    return shards


class _TensorFiles(contextlib.ExitStack):
    """The shards of a checkpoint, filled tensor by tensor.

    Attributes:
        where: the file of every tensor.
    """

    def __init__(self, folder: Path, shards: Mapping[str, _Tensors]) -> None:
        super().__init__()
        self.where = {name: file for file, tensors in shards.items() for name in tensors}
        self._files = {
            file: self.enter_context(TensorFile(folder / file, tensors, {"format": "pt"}))
            for file, tensors in shards.items()
        }

    def write(self, name: str, array: np.ndarray) -> None:
        self._files[self.where[name]].write(name, array)


def _quantize_blocks(
    folder: CheckpointFolder,
    config: DecoderConfig,
    settings: GPTQSettings,
    form: str,
    ids: list[np.ndarray],
    dtype: Any,
    files: _TensorFiles,
    progress: bool,
) -> Iterator[LayerError]:
    """Quantise and write every projection."""
    stream = Stream.embedded(ids, folder.read("model.embed_tokens.weight"), dtype)
    total = config.num_hidden_layers * len(projection_shapes(config))
    with tqdm(total=total, desc="quantising", unit="layer", disable=not progress) as bar:
        since = time.perf_counter()
        for index in range(config.num_hidden_layers):
            block = load_block(folder, config, index, dtype)
            for done in quantize_block(block, stream, folder, config, index, settings):
                for part, array in _packed(done.result, settings, form).items():
                    files.write(f"{done.name}.{part}", np.asarray(array))
                now = time.perf_counter()
                yield LayerError(done.name, float(done.result.loss), done.error, now - since)
                since = now
                bar.set_postfix_str(f"{done.name.removeprefix('model.layers.')} error {done.error:.3%}")
                bar.update()


def _packed(result: GPTQResult, settings: GPTQSettings, form: str) -> dict[str, jax.Array]:
    """The four arrays of a GPTQ checkpoint."""
    return {
        "qweight": pack(result.integers, settings.bits, axis=0),
        "qzeros": encode_zeros(result.zeros, settings.bits, form),
        "scales": result.scales,
        "g_idx": result.g_idx,
    }
