"""GGUF: one file for llama.cpp, quantised weights in Q4_1, which holds 2, 3 and 4 bit.

A block of 20 bytes is 32 inputs of one output:

    d     float16      s
    m     float16      s * (mu - z - k)
    qs    16 bytes     q + k of inputs 0 to 15 in the low four bits, of 16 to 31 in the high four

and stands for d * qs + m. Scales of float16 stay as they are, so what is lost is the rounding of m, at most
2**-11 |mu - z - k| steps, which is 0.008 at 4 bit. Below 4 bit qs has room for another k than 0, and that is taken, one
a group, for which m is rounded least. Where z + k is a power of two and there is no offset, nothing is lost: always at
2 and 3 bit, and in symmetric models at 4 bit.

Everything else keeps its type, as every reader takes it: matrices (embeddings, a head or projections that are not
quantised) in float16, bfloat16 or float32, vectors (norms, biases) in float32.

Source: ``block_q4_1`` of ggml; names, keys and layout of tensors as llama.cpp's own converter writes them; the file
is written with the package ``gguf``, which is theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from convert.hf import copy_companions
from convert.targets.gguf_metadata import add_model, add_tokenizer, gguf_package, read_tokenizer
from convert.targets.host import HostWeight, host_weight, largest_error
from convert.targets.target import Record, Source, Target
from convert.tensors import HFTensor, dense_tensors, hf_tensors, quantized_stacks, take
from convert.writing import write_json
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, DecoderConfig
from lotaqaf_jax.models.rope import inverse_frequencies
from lotaqaf_jax.parallel.processes import is_main
from lotaqaf_jax.quant import QuantizedWeight

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["FILE", "GGUF", "head_rows", "q4_1_blocks", "rope_factors"]

FILE = "model.gguf"
_BLOCK, _BLOCK_BYTES = 32, 20
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_KINDS = {"float16": "F16", "bfloat16": "BF16"}
_OUTPUTS = 1024
"""Outputs converted at a time: the comparison is in float64."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: ``read()`` gives its bytes, and the error of a quantised one, whose ``module`` it is of."""

    name: str
    kind: str
    shape: tuple[int, ...]
    module: str
    read: Callable[[], tuple[np.ndarray, float | None]]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Its shape with the bytes of a row in place of the numbers."""
        *rows, row = self.shape
        return (*rows, row // _BLOCK * _BLOCK_BYTES if self.kind == "Q4_1" else row * _BYTES[self.kind])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.byte_shape, dtype=np.int64))


def q4_1_blocks(weight: HostWeight) -> np.ndarray:
    """The blocks of a weight, (out, in/32 * 20) uint8.

    Args:
        weight: (in, out), integers of at most 4 bits, rows of a group together, in groups of a multiple of 32.
    """
    n_in, n_out = weight.integers.shape
    shift, minima = _minima(weight)
    q = (weight.integers + weight.spread(shift)).T.reshape(n_out, n_in // _BLOCK, 2, _BLOCK // 2)
    blocks = np.empty((n_out, n_in // _BLOCK, _BLOCK_BYTES), np.uint8)
    with np.errstate(over="ignore"):  # Beyond float16's range it is infinite, which is refused as an error.
        for at, per_group in ((0, weight.scales), (2, minima)):
            blocks[:, :, at : at + 2] = _bytes(per_group[weight.g_idx[::_BLOCK]].T, "<f2").reshape(*q.shape[:2], 2)
    blocks[:, :, 4:] = q[:, :, 0] | q[:, :, 1] << 4
    return blocks.reshape(n_out, -1)


def _minima(weight: HostWeight) -> tuple[np.ndarray, np.ndarray]:
    """k, (groups, out) uint8, and m, (groups, out) float16, of every group: the k for which m is rounded least."""
    # In float64, so that the product is rounded once.
    scales, start = weight.scales.astype(np.float64), weight.offset.astype(np.float64) - weight.zeros
    shift, minima = np.zeros(start.shape, np.uint8), np.zeros(start.shape, np.float16)
    least = np.full(start.shape, np.inf)
    for k in range(17 - 2**weight.bits):
        exact = scales * (start - k)
        with np.errstate(over="ignore"):
            rounded = exact.astype(np.float16)
        missed = np.abs(rounded - exact)
        better = (missed < least) | (k == 0)
        shift[better], minima[better], least[better] = k, rounded[better], missed[better]
    return shift, minima


def head_rows(heads: int, head_dim: int) -> np.ndarray:
    """Where every output of llama.cpp's q and k projections comes from, (heads * head_dim,).

    It rotates neighbours, outputs 2i and 2i + 1 of a head, where a Hugging Face model rotates i and i + head_dim/2.
    """
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def rope_factors(config: DecoderConfig) -> np.ndarray | None:
    """By what llama.cpp is to divide the frequency of every pair, (head_dim/2,) float32; None without scaling.

    llama.cpp has no ``rope_type: llama3``: its converter writes this tensor, ``rope_freqs.weight``, in its place.
    """
    if config.rope_scaling is None:
        return None
    plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=None)).astype(np.float64)
    return (plain / inverse_frequencies(config)).astype(np.float32)


def _bytes(array: np.ndarray, dtype: str) -> np.ndarray:
    """(..., n) -> (..., bytes) uint8, little-endian."""
    return np.ascontiguousarray(array).astype(dtype).view(np.uint8)


def _packed(name: str, target: str, weight: QuantizedWeight, i: int | None, rows: np.ndarray | None) -> _Tensor:
    n_in, n_out = weight.shape

    def read() -> tuple[np.ndarray, float]:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        whole, error = host_weight(take(weight, i)), 0.0
        blocks = np.empty((n_out, n_in // _BLOCK * _BLOCK_BYTES), np.uint8)
        for start in range(0, n_out, _OUTPUTS):
            part = whole.columns(start, start + _OUTPUTS)
            made = q4_1_blocks(part)
            with np.errstate(invalid="ignore"):  # infinity times 0
                values = dequantize(made, GGMLQuantizationType.Q4_1)
            error = max(error, largest_error(values.T.astype(np.float64), part))
            blocks[start : start + _OUTPUTS] = made
        return blocks if rows is None else blocks[rows], error

    return _Tensor(target, "Q4_1", (n_out, n_in), name, read)


def _dense(tensor: HFTensor, target: str, rows: np.ndarray | None) -> _Tensor:
    kind = "F32" if len(tensor.shape) == 1 else _KINDS.get(tensor.dtype.name, "F32")

    def read() -> tuple[np.ndarray, None]:
        array = tensor.read()
        array = array if rows is None else array[rows]
        return _bytes(array, "<f4") if kind == "F32" else np.ascontiguousarray(array).view(np.uint8), None

    return _Tensor(target, kind, tensor.shape, tensor.name.rpartition(".")[0], read)


def _tensors(model: Decoder) -> list[_Tensor]:
    """All tensors of the file, in its order; nothing is fetched yet."""
    gguf, config = gguf_package(), model.config
    if config.rope_scaling is not None and config.model_type != "llama":
        raise ConfigError(
            f"--target gguf: rope_type 'llama3' in a {config.model_type} model, which llama.cpp does not compute. Use "
            "another target; gptq holds every model that loads."
        )
    names = gguf.get_tensor_name_map(_architecture(config), config.num_hidden_layers)
    packed, dense = quantized_stacks(model), dense_tensors(model)
    factors, tensors = rope_factors(config), []
    if factors is not None:
        tensors.append(_Tensor("rope_freqs.weight", "F32", factors.shape, "", lambda: (_bytes(factors, "<f4"), None)))
    for tensor in hf_tensors(model):
        module, _, part = tensor.name.rpartition(".")
        rows, name = _rows(config, module), names.get_name(module)
        if tensor.name in dense:
            tensors.append(_dense(tensor, f"{name}.{part}", rows))
        elif part == "qweight":
            tensors.append(_packed(module, f"{name}.weight", *packed[module], rows))
    return tensors


def _rows(config: DecoderConfig, module: str) -> np.ndarray | None:
    """The order of a module's outputs, where it is not the model's own."""
    if config.model_type != "llama" or not module.endswith((".q_proj", ".k_proj")):
        return None
    heads = config.num_attention_heads if module.endswith(".q_proj") else config.num_key_value_heads
    return head_rows(heads, config.head_dim)


def _architecture(config: DecoderConfig) -> Any:
    arch = gguf_package().MODEL_ARCH
    return {"llama": arch.LLAMA, "qwen2": arch.QWEN2}[config.model_type]


def _write(model: Decoder, source: Source, folder: Path, record: Record, progress: bool) -> None:
    tensors = _tensors(model)
    tokenizer = read_tokenizer(source.folder, model.config.vocab_size)
    writer = None
    try:
        if is_main():
            if source.folder is not None:
                copy_companions(source.folder, folder, skip=("config.json", "quantize_config.json"))
            write_json(folder / "config.json", source.plain_config)
            gguf = gguf_package()
            writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[_architecture(model.config)])
            add_model(writer, model.config, source, kinds=[tensor.kind for tensor in tensors])
            add_tokenizer(writer, tokenizer, source.folder)
            _begin(writer, tensors)
        total = sum(tensor.nbytes for tensor in tensors)
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=1.0, disable=not progress) as bar:
            for tensor in tensors:
                data, error = tensor.read()
                if error is not None:
                    record(tensor.module, error)
                if writer is not None:
                    writer.write_tensor_data(data)
                bar.update(tensor.nbytes)
    finally:
        if writer is not None:
            writer.close()


def _begin(writer: GGUFWriter, tensors: list[_Tensor]) -> None:
    """Everything before the tensors' data, which then follows one tensor at a time, in this order."""
    kinds = gguf_package().GGMLQuantizationType
    for tensor in tensors:
        shape = tensor.byte_shape
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kinds[tensor.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


GGUF = Target(
    name="gguf",
    title="GGUF, one file, Q4_1",
    bits=(2, 3, 4),
    group_sizes=(32, 64, 128, 256, 512, 1024, -1),
    inputs=_BLOCK,
    act_order=False,
    offset="in the minima of the blocks, rounded to float16",
    exact="without an offset (at 4 bit: if symmetric) and with float16 scales; else off by up to 0.008 of a step",
    runtimes=("llama.cpp and what is built on it", "transformers"),
    size=lambda model, _: sum(tensor.nbytes for tensor in _tensors(model)),
    write=_write,
)
