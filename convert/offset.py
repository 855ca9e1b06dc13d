"""The fractional part of a merge: mu, as a PEFT LoRA folder that other software applies, and exactly, for ourselves.

GPTQ has integer zero points, so mu of w = s * (q - z + mu) goes beside the model, as a LoRA whose rank is the number of
groups. With g(i) the group of input row i (through g_idx, so act-order works):

    lora_A[g, i] = 1 if g(i) = g else 0        (groups, in)
    lora_B[j, g] = s[g, j] * mu[g, j]          (out, groups)
    x @ lora_A.T @ lora_B.T = sum_i x[i] * s[g(i), j] * mu[g(i), j],   scaled by lora_alpha / r = 1

The only error is the rounding of s * mu to the type of lora_B. Dividing it by s does not give mu back bit for bit, so
mu itself lies beside, in ``lota_offset.safetensors``, a file that PEFT does not look at.

Layers with fewer groups have a lower rank (``rank_pattern`` with ``alpha_pattern``, so that the scale stays 1). Servers
that know one rank only (SGLang) get a LoRA padded with zeros to the widest, about twice as large: target peft.
Quantised modules without an offset get a zero adapter of rank 1, since GPTQModel wants one for each.

Source: formats of PEFT's LoRA folders, read with peft 0.21 and GPTQModel 7.6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, lora_config
from convert.tensors import named_linears, quantized_stacks, take
from convert.writing import write_json, write_safetensors
from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.models import Decoder, Linear, linears
from lotaqaf_jax.parallel.processes import fetch, is_main
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.quant.folder import TensorEntry, read_header
from lotaqaf_jax.quant.weight import trivial_g_idx

__all__ = [
    "OFFSET_FILE",
    "OFFSET_FOLDER",
    "apply_offsets",
    "fill_lora",
    "fill_offsets",
    "has_offsets",
    "lora_bytes",
    "lora_pair",
    "offset_bytes",
    "write_offsets",
]

OFFSET_FOLDER = "offset_adapter"
OFFSET_FILE = "lota_offset.safetensors"


def has_offsets(model: Decoder) -> bool:
    """Whether any weight of the model has an offset."""
    return any(linear.is_quantized and linear.packed.offset is not None for _, linear, _ in named_linears(model))


def lora_pair(
    weight: QuantizedWeight, dtype: Any = np.float32, rank: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """lora_A (rank, in) and lora_B (out, rank) that add the offset of ``weight``; zeros of rank 1 where it has none.

    Args:
        weight: one quantised weight (in, out).
        dtype: their type. lora_A is exact in any; s * mu is computed in float32 and rounded once.
        rank: to pad to with zeros; None for as many as there are groups.
    """
    n_in, n_out = weight.shape
    if weight.offset is None:
        rank = 1 if rank is None else rank
        return np.zeros((rank, n_in), dtype), np.zeros((n_out, rank), dtype)
    rank = weight.groups if rank is None else rank
    g_idx = trivial_g_idx(n_in, weight.group_size) if weight.g_idx is None else fetch(weight.g_idx)
    indicator = (g_idx[None, :] == np.arange(rank)[:, None]).astype(dtype)
    step = fetch(weight.scales).astype(np.float32) * fetch(weight.offset).astype(np.float32)
    return indicator, np.pad(step.T.astype(dtype), ((0, 0), (0, rank - weight.groups)))


def _ranks(model: Decoder, one_rank: bool = False) -> dict[str, int]:
    """Rank of the LoRA of every quantised module."""
    found = {
        name: 1 if weight.offset is None else weight.groups for name, (weight, _) in quantized_stacks(model).items()
    }
    return dict.fromkeys(found, max(found.values(), default=0)) if one_rank else found


def lora_bytes(model: Decoder, dtype: Any = np.float32, *, one_rank: bool = False) -> int:
    """Bytes that :func:`fill_lora` will write; 0 without offsets."""
    if not has_offsets(model):
        return 0
    held = quantized_stacks(model)
    return np.dtype(dtype).itemsize * sum(r * sum(held[name][0].shape) for name, r in _ranks(model, one_rank).items())


def offset_bytes(model: Decoder, dtype: Any = np.float32) -> int:
    """Bytes that :func:`write_offsets` will write; 0 without offsets."""
    exact = 0
    for weight, _ in quantized_stacks(model).values():
        if weight.offset is not None:
            exact += weight.groups * weight.shape[1] * weight.offset.dtype.itemsize
    return lora_bytes(model, dtype) + exact


def write_offsets(model: Decoder, folder: Path, *, model_name: str, dtype: Any = np.float32) -> None:
    """Write the offsets of a merged model into ``folder``: a PEFT LoRA folder, and mu itself.

    Args:
        model: a merged decoder.
        folder: the folder; made.
        model_name: what the LoRA's config names as its base: the merged model.
        dtype: type of the LoRA's tensors. float32 leaves an error of 2**-24 of mu; float16 is half the size.
    """
    if is_main():
        folder.mkdir()
    fill_offsets(model, folder, model_name=model_name, dtype=dtype)


def fill_offsets(model: Decoder, folder: Path, *, model_name: str, dtype: Any = np.float32) -> None:
    """The files of :func:`write_offsets`, into a folder that is there."""
    fill_lora(model, folder, model_name=model_name, dtype=dtype)
    stacks = quantized_stacks(model)
    exact: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for name, (weight, _) in stacks.items():
        if weight.offset is not None:
            exact[f"{name}.offset"] = (weight.offset.dtype, (weight.groups, weight.shape[1]))

    def read(key: str) -> np.ndarray:
        return fetch(take(*stacks[key.removesuffix(".offset")]).offset)

    write_safetensors(folder / OFFSET_FILE, exact, read, {"format": "lota-qaf offset"})


def fill_lora(
    model: Decoder, folder: Path, *, model_name: str, dtype: Any = np.float32, one_rank: bool = False
) -> None:
    """The PEFT LoRA of the offsets, into a folder that is there.

    Args:
        model: a merged decoder.
        folder: the folder.
        model_name: what its config names as its base: the merged model.
        dtype: type of its tensors.
        one_rank: pad all modules to the widest.
    """
    lora: dict[str, tuple[Any, tuple[int, ...]]] = {}
    ranks, stacks = _ranks(model, one_rank), quantized_stacks(model)
    for name, (weight, _) in stacks.items():
        lora[f"{PREFIX}{name}.lora_A.weight"] = (dtype, (ranks[name], weight.shape[0]))
        lora[f"{PREFIX}{name}.lora_B.weight"] = (dtype, (weight.shape[1], ranks[name]))

    def read(key: str) -> np.ndarray:
        module, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        return lora_pair(take(*stacks[module]), dtype, ranks[module])[0 if part == "lora_A" else 1]

    write_safetensors(folder / ADAPTER_WEIGHTS, lora, read, {"format": "pt"})
    dense = [name for name, linear, _ in named_linears(model) if not linear.is_quantized]
    write_json(folder / ADAPTER_CONFIG, lora_config(ranks, ranks, dense, model_name))


def apply_offsets(model: Decoder, folder: str | Path) -> Decoder:
    """Give the weights of a merged model their offsets back, bit for bit, from ``lota_offset.safetensors``.

    Args:
        model: the merged model, loaded from its GPTQ files.
        folder: its ``offset_adapter`` folder.

    Returns:
        A new model over the same words.

    Raises:
        CheckpointError: the file is missing, damaged or does not fit the model.
    """
    path = Path(folder) / OFFSET_FILE
    entries = read_header(path)
    model = nnx.merge(*nnx.split(model), copy=True)
    left = set(entries)
    for names, linear in _stacks(model):
        wanted = [f"{name}.offset" for name in names]
        held = [name for name in wanted if name in entries]
        if not held:
            continue
        if len(held) < len(wanted) or not linear.is_quantized:
            raise CheckpointError(
                f"{path}: the offset of {min(set(wanted) - set(held) or wanted)} does not fit the model."
            )
        weight = linear.packed
        shape = (weight.groups, weight.shape[1])
        rows = np.stack([_read(entries[name], path, name, shape) for name in wanted])
        offset = jnp.asarray(rows[0] if linear is model.lm_head else rows)
        linear.weight.set_value(dataclasses.replace(weight, offset=offset))
        if linear.sharding is not None:
            linear.weight.set_value(jax.device_put(linear.packed, linear.weight_shardings()))
        left -= set(wanted)
    if left:
        raise CheckpointError(f"{path}: no place for {min(left)}. Pass the model that it was written with.")
    return model


def _stacks(model: Decoder) -> Iterator[tuple[list[str], Linear]]:
    yield from linears(model)
    if model.lm_head is not None:
        yield ["lm_head"], model.lm_head


def _read(entry: TensorEntry, path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if entry.shape != shape or entry.dtype.name not in ("float32", "float16", "bfloat16"):
        raise CheckpointError(f"{path}: {name} is {entry.dtype} {entry.shape}, expected floats {shape}.")
    with path.open("rb") as file:
        file.seek(entry.start)
        return np.frombuffer(file.read(entry.nbytes), entry.dtype).reshape(shape)
