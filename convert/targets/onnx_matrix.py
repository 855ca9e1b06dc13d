"""A quantised weight as ONNX holds it: the operator MatMulNBits, and what is put around it for act-order and for mu.

MatMulNBits computes x Wᵀ with W of shape (out, in), cut along the inputs into blocks of a power of two of rows:

    words     (out, blocks, block * bits / 8) uint8    the integers q, the first in the low bits
    scales    (out, blocks) float32                    s
    zeros     (out, blocks * bits / 8) uint8           z, packed alike, each row filled up to whole bytes

and W = s * (q - z). Integers of 3 bits lie in 4. A group that is no power of two, or has more than 256 rows, is several
blocks with the same scale.

``order`` (in,) int64: the inputs taken in this order have the rows of a group together; None where they have.
``sums`` (in, groups) and ``offsets`` (groups, out) float32, s * mu, where there is an offset: x is summed up in each
group and multiplied by that, as in a LoRA, so that it costs little, at every width. MatMulNBits takes zero points in
float too, but in ONNX Runtime 1.32 on a CPU not at 8 bit, and then it unpacks the whole weight for every token, ten
times as slow. Nor is its input ``g_idx`` used: there that is refused at 8 bit and computes wrong numbers at 2 and 4.

Source: the operator's schema in ONNX Runtime, ``com.microsoft.MatMulNBits``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.targets.host import HostWeight
from lotaqaf_jax.quant.weight import group_length, trivial_g_idx

__all__ = ["Matrix", "block_rows", "matrix", "stored_bits"]

SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The arrays above, and W back from them.

    Attributes:
        bits: width that an integer has in ``words``.
        block: rows of a block.
        n_in: inputs; the last block may be longer.
        words, scales, zeros, order, sums, offsets: see the module.
    """

    bits: int
    block: int
    n_in: int
    words: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    order: np.ndarray | None = None
    sums: np.ndarray | None = None
    offsets: np.ndarray | None = None

    def columns(self, start: int, stop: int) -> Matrix:
        """The part of some outputs."""
        cut = {name: getattr(self, name)[start:stop] for name in ("words", "scales", "zeros")}
        return dataclasses.replace(self, **cut, offsets=None if self.offsets is None else self.offsets[:, start:stop])

    def values(self) -> np.ndarray:
        """W, (in, out) float64."""
        n_out, blocks, _ = self.words.shape
        q = _unpack(self.words, self.bits).astype(np.float64)
        z = _unpack(self.zeros.reshape(n_out, -1), self.bits)[:, :blocks, None].astype(np.float64)
        scales = self.scales.reshape(n_out, blocks, 1).astype(np.float64)
        found = (scales * (q - z)).reshape(n_out, -1)[:, : self.n_in].T
        if self.sums is not None and self.offsets is not None:
            found = found + self.sums.astype(np.float64) @ self.offsets.astype(np.float64)
        if self.order is None:
            return found
        values = np.empty_like(found)
        values[self.order] = found
        return values


def stored_bits(bits: int) -> int:
    """Width in which integers of ``bits`` are stored."""
    return 4 if bits == 3 else bits


def block_rows(n_in: int, group_size: int) -> int:
    """Rows of a block: the largest power of two that divides a group, at most 256; too small where it is below 16."""
    rows = group_length(n_in, group_size)
    return min(rows & -rows, _LARGEST_BLOCK)


def matrix(weight: HostWeight) -> Matrix | None:
    """What a weight is stored as; None where its scattered groups are not of one length, which are not held.

    Args:
        weight: (in, out), its groups of a multiple of 16 rows.
    """
    n_in, n_out = weight.integers.shape
    bits, block = stored_bits(weight.bits), block_rows(n_in, weight.group_size)
    blocks = -(-n_in // block)
    order = np.argsort(weight.g_idx, kind="stable")
    group = weight.g_idx[order]
    if not np.array_equal(group, trivial_g_idx(n_in, weight.group_size)):
        return None
    q = np.zeros((n_out, blocks * block), np.uint8)
    q[:, :n_in] = weight.integers[order].T
    of_block = group[::block]
    sums = offsets = None
    if np.any(weight.offset):
        sums = (group[:, None] == np.arange(len(weight.scales))).astype(np.float32)
        # In float64, so that the product is rounded once.
        offsets = (weight.scales.astype(np.float64) * weight.offset).astype(np.float32)
    return Matrix(
        bits,
        block,
        n_in,
        _pack(q, bits).reshape(n_out, blocks, -1),
        weight.scales[of_block].T.astype(np.float32),
        _pack(weight.zeros[of_block].T.astype(np.uint8), bits),
        None if np.array_equal(order, np.arange(n_in)) else order.astype(np.int64),
        sums,
        offsets,
    )


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """(rows, n) -> (rows, bytes) uint8, the first value in the low bits, the last byte filled up with zeros."""
    per_byte = 8 // bits
    filled = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte)))
    packed = np.zeros((len(values), filled.shape[1] // per_byte), np.uint8)
    for i in range(per_byte):
        packed |= filled[:, i::per_byte] << np.uint8(i * bits)
    return packed


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """(..., bytes) uint8 -> (..., values) uint8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(*packed.shape[:-1], -1)
