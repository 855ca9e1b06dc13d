"""Packing of small unsigned integers into 32-bit words: one contiguous little-endian bitstream.

Value ``i`` of a column occupies the bits ``i*bits ... (i+1)*bits - 1`` of the stream, bit 0 being the lowest bit of
word 0. A 3-bit value can straddle two words. The pattern repeats after ``period`` values (32/bits of them in one word
for 2, 4 and 8 bit; 32 of them in three words for 3 bit), and both functions below work one period at a time.

Source: the ``qweight`` and ``qzeros`` layout of GPTQ checkpoints, formats ``gptq`` and ``gptq_v2``.
"""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lotaqaf_jax.errors import ConfigError

__all__ = ["SUPPORTED_BITS", "check_bits", "pack", "packed_size", "period", "unpack"]

SUPPORTED_BITS = (2, 3, 4, 8)
WORD = 32


def check_bits(bits: int, where: str = "bits") -> int:
    """Return ``bits`` if it is a supported width.

    Args:
        bits: the width of one value.
        where: what to call it in the error.

    Raises:
        ConfigError: the width is not one of 2, 3, 4, 8.
    """
    try:
        width = operator.index(bits)  # NumPy's integers are as good; 4.0 compares equal to one, but is none.
    except TypeError:
        width = 0
    if width not in SUPPORTED_BITS:
        raise ConfigError(
            f"{where}: {bits!r} is not a supported width; expected one of {SUPPORTED_BITS}. "
            "Quantise the model to one of these widths."
        )
    return width


def packed_size(count: int, bits: int) -> int:
    """Number of words that hold ``count`` values: ceil(count * bits / 32)."""
    return -(-count * bits // WORD)


def period(bits: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Return (values, words) of one period, and each value's first word and its shift there."""
    values = WORD // math.gcd(WORD, bits)
    start = np.arange(values) * bits
    return values, values * bits // WORD, start // WORD, (start % WORD).astype(np.uint32)


def unpack(words: ArrayLike, bits: int, count: int, axis: int = 0) -> jax.Array:
    """Read ``count`` values of ``bits`` bits along ``axis``.

        value_i = (stream >> i*bits) & (2**bits - 1)

    Args:
        words: int32 or uint32, any shape; ``axis`` has ceil(count * bits / 32) entries.
        bits: 2, 3, 4 or 8.
        count: number of values along ``axis`` of the result.
        axis: the packed axis.

    Returns:
        uint8, the shape of ``words`` with ``axis`` of length ``count``.

    Raises:
        ConfigError: an unsupported width.
        ValueError: ``axis`` does not have the number of words that ``count`` values need.
    """
    check_bits(bits)
    stream = jnp.asarray(words)
    expected = packed_size(count, bits)
    if stream.shape[axis] != expected:
        raise ValueError(f"{count} values of {bits} bits need {expected} words, found {stream.shape[axis]}")
    return _unpack(stream, bits, count, axis)


# Compiled as one, so that a plain call does not compile a dozen small operations for every new shape; inlined, so that
# under another jit it is as if this were not here.
@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _unpack(words: jax.Array, bits: int, count: int, axis: int) -> jax.Array:
    stream = jax.lax.bitcast_convert_type(jnp.moveaxis(words, axis, -1), jnp.uint32)
    values, period_words, first, shift = period(bits)
    periods = -(-count // values)
    missing = periods * period_words - stream.shape[-1]
    stream = jnp.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, missing)])
    stream = stream.reshape(*stream.shape[:-1], periods, period_words)
    fields = stream[..., first] >> shift
    straddles = shift + bits > WORD
    if straddles.any():
        after = np.minimum(first + 1, period_words - 1)
        # A shift by 32 is undefined, so a value that ends in its own word shifts by 0 and is masked out.
        high = stream[..., after] << np.where(straddles, WORD - shift, 0).astype(np.uint32)
        fields = fields | jnp.where(straddles, high, jnp.uint32(0))
    fields = (fields & np.uint32(2**bits - 1)).astype(jnp.uint8)
    fields = fields.reshape(*fields.shape[:-2], periods * values)[..., :count]
    return jnp.moveaxis(fields, -1, axis)


def pack(values: ArrayLike, bits: int, axis: int = 0) -> jax.Array:
    """Write values of ``bits`` bits along ``axis``; the inverse of :func:`unpack`. Unused bits are 0.

    Args:
        values: integers in {0, ..., 2**bits - 1}, any shape. Higher bits are cut off, not checked.
        bits: 2, 3, 4 or 8.
        axis: the axis to pack.

    Returns:
        int32, the shape of ``values`` with ``axis`` of length ceil(count * bits / 32).

    Raises:
        ConfigError: an unsupported width.
    """
    check_bits(bits)
    return _pack(jnp.asarray(values), bits, axis)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _pack(values: jax.Array, bits: int, axis: int) -> jax.Array:
    fields = jnp.moveaxis(values, axis, -1).astype(jnp.uint32) & np.uint32(2**bits - 1)
    count = fields.shape[-1]
    period_values, period_words, first, shift = period(bits)
    periods = -(-count // period_values)
    missing = periods * period_values - count
    fields = jnp.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, missing)])
    fields = fields.reshape(*fields.shape[:-1], periods, period_values)
    low = fields << shift
    columns = []
    for word in range(period_words):
        column = low[..., first == word].sum(axis=-1, dtype=jnp.uint32)
        carried = np.flatnonzero((first == word - 1) & (shift + bits > WORD))
        for i in carried:
            column = column | (fields[..., i] >> np.uint32(WORD - shift[i]))
        columns.append(column)
    stream = jnp.stack(columns, axis=-1).reshape(*fields.shape[:-2], periods * period_words)
    stream = stream[..., : packed_size(count, bits)]
    return jnp.moveaxis(jax.lax.bitcast_convert_type(stream, jnp.int32), -1, axis)
