"""ONNX: a graph for ONNX Runtime, and all that onnxruntime-genai generates with. For a CPU, computing in float32.

    model.onnx, model.onnx.data    the graph, and its weights: MatMulNBits where quantised, else float32
    genai_config.json              names of inputs and outputs, special tokens, settings of the search

beside config.json and the tokenizer's files as they were.

Source: onnxruntime-genai, whose model builder writes the graph; :mod:`convert.targets.onnx_matrix` has the weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert.hf import copy_companions
from convert.hf_config import complete_config
from convert.targets.host import HostWeight, host_weight, largest_error
from convert.targets.onnx_graph import Dense, Packed, build_graph, onnx_packages, read_matrices
from convert.targets.onnx_matrix import SMALLEST_BLOCK, Matrix, block_rows, matrix, stored_bits
from convert.targets.target import Record, Source, Target
from convert.tensors import dense_tensors, quantized_stacks, take
from convert.writing import write_json
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.parallel.processes import agree, is_main

__all__ = ["ONNX"]

_OUTPUTS = 1024
"""Outputs compared at a time, in float64."""


def _size(model: Decoder) -> int:
    config = model.config
    size = 4 * config.max_position_embeddings * config.head_dim  # cosines and sines
    sums = set()
    for tensor in dense_tensors(model).values():
        size += 4 * int(np.prod(tensor.shape, dtype=np.int64))
    for weight, _ in quantized_stacks(model).values():
        n_in, n_out = weight.shape
        blocks = -(-n_in // block_rows(n_in, weight.group_size))
        size += n_out * (n_in * stored_bits(weight.bits) // 8 + 5 * blocks)
        if weight.g_idx is not None:
            size += 8 * n_in
        if weight.offset is not None:
            size += 4 * weight.groups * n_out
            sums.add((n_in, weight.groups))
    return size + sum(4 * n_in * groups for n_in, groups in sums)


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    onnx_packages()
    modules = _modules(model, progress)
    if is_main():
        if source.folder is not None:
            copy_companions(source.folder, folder, skip=("config.json", "quantize_config.json"))
        config = complete_config(model, source.plain_config)
        write_json(folder / "config.json", {k: v for k, v in config.items() if k != "quantization_config"})
        build_graph(folder, model.config.model_type, model.lm_head is None, modules)
    del modules
    read = read_matrices(folder) if is_main() else None
    for name, (weight, i) in quantized_stacks(model).items():
        whole = host_weight(take(weight, i))
        error = 0.0 if read is None else _error(read(name), whole)
        record(name, float(agree(repr(error))))


def _modules(model: Decoder, progress: bool) -> dict[str, Dense | Packed]:
    """Everything that the builder is handed: the whole model in the host's memory, packed as it will be."""
    import torch

    modules: dict[str, Dense | Packed] = {}
    with tqdm(quantized_stacks(model).items(), desc="writing", delay=1.0, disable=not progress) as bar:
        for name, (weight, i) in bar:
            found = matrix(host_weight(take(weight, i)))
            if found is None:
                raise _refused(name, "is in act-order with groups that are not of one length")
            modules[name] = Packed(found)
    for tensor in dense_tensors(model).values():
        module, _, end = tensor.name.rpartition(".")
        # Copied, since torch warns of memory that it could not write to; it does not take NumPy's bfloat16.
        array = np.array(tensor.read(), np.float32 if tensor.dtype.name == "bfloat16" else tensor.dtype)
        if end == "weight":
            modules[module] = Dense(array)
        else:
            modules[module].bias = torch.tensor(array)  # The builder asks torch whether it is zero.
    return modules


def _refused(name: str, why: str) -> ConfigError:
    return ConfigError(f"--target onnx: {name} {why}. Use another target; gptq holds every model that loads.")


def _error(written: Matrix, weight: HostWeight) -> float:
    error = 0.0
    for start in range(0, weight.integers.shape[1], _OUTPUTS):
        stop = start + _OUTPUTS
        error = max(error, largest_error(written.columns(start, stop).values(), weight.columns(start, stop)))
    return error


ONNX = Target(
    name="onnx",
    title="ONNX for CPUs, MatMulNBits",
    group_rows=SMALLEST_BLOCK,
    group_sizes=(16, 32, 64, 128, 256, 512, 1024, -1),
    offset="as sums of groups beside each product",
    exact="yes",
    runtimes=("ONNX Runtime", "onnxruntime-genai"),
    size=lambda model, _: _size(model),
    write=_write,
)
