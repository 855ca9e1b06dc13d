"""AWQ, the layout of its GEMM kernels, 4 bit.

    qweight  (in, out/8)      int32   field k of a word holds column 8*c + ORDER[k], lowest bits first
    qzeros   (in/g, out/8)    int32   likewise; the zero points as they are
    scales   (in/g, out)      float16 or bfloat16
    W[i, j] = scales[i // g, j] * (q[i, j] - zeros[i // g, j])

The grid is GPTQ's. What differs is along which axis integers are packed, and the order of columns in a word.

Source: AWQ on disk as AutoAWQ and GPTQModel 7.6 write it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant.config import ModuleQuantization, QuantizationConfig
from lotaqaf_jax.quant.files import TensorEntry
from lotaqaf_jax.quant.formats.view import Converted, Stored, View, Words, described
from lotaqaf_jax.quant.packing import packed_size

__all__ = ["ORDER", "read_config", "to_gptq", "to_gptq_zeros", "view", "words"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FIELDS = 8
_BLOCK = 2**16  # words that are turned over at once, so that they stay in a processor's cache
_THREADS = 8


def _turned(words: np.ndarray) -> np.ndarray:
    """Transpose the 8 x 8 fields of every 8 words, in place: field k of word i <-> field i of word k.

    Blocks of 4, 2 and 1 fields change places, which takes a few operations a word instead of a few a field.

    Args:
        words: (rows, 8, columns) uint32.
    """
    rows, _, columns = words.shape
    for fields, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = words.reshape(rows, _FIELDS // (2 * fields), 2, fields, columns)
        low, high, shift = pairs[:, :, 0], pairs[:, :, 1], np.uint32(4 * fields)
        swap = ((low >> shift) ^ high) & np.uint32(mask)
        high ^= swap
        low ^= swap << shift
    return words


def _step(columns: int) -> int:
    """Rows of GPTQ's words in a block."""
    return max(1, _BLOCK // max(1, _FIELDS * columns))


def _each(turn: Callable[[int], None], starts: range) -> None:
    """Every block, by several threads where there are many: numpy's loops leave the interpreter to others."""
    if len(starts) < 2 * _THREADS:
        for start in starts:
            turn(start)
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(turn, starts):
            pass


def to_gptq(qweight: np.ndarray) -> np.ndarray:
    """GPTQ's ``qweight`` (ceil(in/8), out) from AWQ's (in, out/8), both int32."""
    n_in, columns = qweight.shape
    found = np.empty((packed_size(n_in, 4), columns * _FIELDS), np.int32)
    step = _step(columns)

    def turn(start: int) -> None:
        block = qweight[start * _FIELDS : (start + step) * _FIELDS].view(np.uint32)
        rows = -(-len(block) // _FIELDS)
        turned = np.zeros((rows * _FIELDS, columns), np.uint32)
        turned[: len(block)] = block
        turned = _turned(turned.reshape(rows, _FIELDS, columns))
        target = found[start : start + rows].view(np.uint32).reshape(rows, columns, _FIELDS)
        for field, column in enumerate(ORDER):
            target[:, :, column] = turned[:, field]

    _each(turn, range(0, len(found), step))
    return found


def words(qweight: np.ndarray, in_features: int) -> np.ndarray:
    """AWQ's ``qweight`` (in, out/8) from GPTQ's (ceil(in/8), out), both int32; the inverse of :func:`to_gptq`."""
    columns = qweight.shape[1] // _FIELDS
    found = np.empty((in_features, columns), np.int32)
    step = _step(columns)

    def turn(start: int) -> None:
        block = np.ascontiguousarray(qweight[start : start + step]).view(np.uint32)
        fields = np.ascontiguousarray(block.reshape(len(block), columns, _FIELDS)[:, :, ORDER].transpose(0, 2, 1))
        target = found[start * _FIELDS : (start + step) * _FIELDS].view(np.uint32)
        target[:] = _turned(fields).reshape(-1, columns)[: len(target)]

    _each(turn, range(0, len(qweight), step))
    return found


def to_gptq_zeros(qzeros: np.ndarray) -> np.ndarray:
    """GPTQ's ``qzeros`` (groups, out/8) in format gptq_v2, from AWQ's: the fields of every word in order."""
    stored = qzeros.view(np.uint32)
    found = np.zeros_like(stored)
    for field, column in enumerate(ORDER):
        found |= ((stored >> np.uint32(4 * field)) & np.uint32(15)) << np.uint32(4 * column)
    return found.view(np.int32)


def read_config(config: Mapping[str, Any], where: str) -> QuantizationConfig:
    """What ``quantization_config`` of method ``awq`` says, as GPTQ's config.

    Raises:
        ConfigError: a width other than 4, another layout than GEMM's, or a group size that is none.
    """
    if config.get("bits", config.get("w_bit", 4)) != 4:
        raise ConfigError(
            f"{where}: bits is {config.get('bits')!r}, expected 4, the width of AWQ. Use GPTQ for others."
        )
    layout = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    if layout != "gemm":
        raise ConfigError(
            f"{where}: version is {layout!r}, expected 'gemm'; the other layouts of AWQ order words for one kernel. "
            "Save the model again with version gemm."
        )
    known = {"bits": 4, "group_size": config.get("group_size", config.get("q_group_size", 128)), "sym": False}
    return QuantizationConfig.from_hf(known | {"checkpoint_format": "gptq_v2"}, where)


def view(config: QuantizationConfig, entries: Mapping[str, TensorEntry]) -> View:
    """An AWQ folder as a GPTQ one.

    Args:
        config: of :func:`read_config`.
        entries: the tensors of its files.

    Raises:
        CheckpointError: a tensor of a quantised module is missing or of another type.
    """
    stored, int32 = Stored(entries), np.dtype(np.int32)
    tensors = stored.others(f"{name}.{part}" for name in stored.modules("qweight") for part in ("qweight", "qzeros"))
    held: dict[str, Words] = {}
    modules: dict[str, ModuleQuantization] = {}
    for name in stored.modules("qweight"):
        qweight, qzeros = (stored.matrix(f"{name}.{part}", [int32]) for part in ("qweight", "qzeros"))
        n_in, columns = qweight.shape

        def read_words(key: str = f"{name}.qweight") -> np.ndarray:
            return to_gptq(stored.read(key))

        def read_zeros(key: str = f"{name}.qzeros") -> np.ndarray:
            return to_gptq_zeros(stored.read(key))

        def back(found: np.ndarray, n_in: int = n_in) -> np.ndarray:
            return words(found, n_in)

        tensors[f"{name}.qweight"] = Converted(int32, (packed_size(n_in, 4), columns * _FIELDS), read_words)
        tensors[f"{name}.qzeros"] = Converted(int32, qzeros.shape, read_zeros)
        held[name] = Words(f"{name}.qweight", back)
        modules[name] = config.default
    return View("awq", described(config.default, modules), tensors, held)
