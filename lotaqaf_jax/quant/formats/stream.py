"""GPTQ's bitstream in NumPy: what is converted while a file is read does not go over the device."""

from __future__ import annotations

import numpy as np

from lotaqaf_jax.quant.packing import WORD, packed_size, period

__all__ = ["pack_rows", "unpack_rows"]


def unpack_rows(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` values of the stream in every row.

    Args:
        words: (rows, ceil(count*bits/32)) int32 or uint32.
        bits: 2, 3, 4 or 8.
        count: number of values.

    Returns:
        (rows, count) uint8.
    """
    values, period_words, first, shift = period(bits)
    periods = -(-count // values)
    padded = np.zeros((len(words), periods * period_words), np.uint32)
    padded[:, : words.shape[1]] = words.view(np.uint32)
    stream = padded.reshape(len(words), periods, period_words)
    fields = np.empty((len(words), periods, values), np.uint8)
    for i in range(values):
        value = stream[:, :, first[i]] >> shift[i]
        if shift[i] + bits > WORD:
            value |= stream[:, :, first[i] + 1] << np.uint32(WORD - shift[i])
        fields[:, :, i] = value & np.uint32(2**bits - 1)
    return fields.reshape(len(words), -1)[:, :count]


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of :func:`unpack_rows`: (rows, count) in {0, ..., 2**bits - 1} to int32 words; unused bits are 0."""
    rows, count = values.shape
    digits = (values.astype(np.uint8)[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    stream = np.zeros((rows, packed_size(count, bits) * WORD // 8), np.uint8)
    filled = np.packbits(digits.reshape(rows, count * bits), axis=1, bitorder="little")
    stream[:, : filled.shape[1]] = filled
    return stream.view("<i4")
