"""Zero points as GPTQ checkpoints store them.

``gptq_v2`` stores zero points as they are. ``gptq`` (v1) stores zero minus one: for 2, 4 and 8 bit its writers subtract
one from every field by a single subtraction on the whole 32-bit word, so that a borrow from a zero point of 0 runs into
the next field; for 3 bit they subtract field by field, modulo 8. Decoding undoes exactly that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant.packing import check_bits, pack, unpack

__all__ = ["CHECKPOINT_FORMATS", "check_format", "decode_zeros", "encode_zeros"]

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
_WORD_OF_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def check_format(checkpoint_format: str, where: str = "checkpoint_format") -> str:
    """Return ``checkpoint_format`` if it can be read exactly.

    Raises:
        ConfigError: it is not ``gptq`` or ``gptq_v2``; ``gptq_p`` is named with its reason.
    """
    if checkpoint_format in CHECKPOINT_FORMATS:
        return checkpoint_format
    reason = " (bit-planar words: the same names and shapes, other bits)" if checkpoint_format == "gptq_p" else ""
    raise ConfigError(
        f"{where}: {checkpoint_format!r}{reason} cannot be read; expected one of {CHECKPOINT_FORMATS}. "
        "Save the model again in one of these formats."
    )


def decode_zeros(qzeros: ArrayLike, bits: int, out_features: int, checkpoint_format: str) -> jax.Array:
    """True zero points from the stored words.

    Args:
        qzeros: (groups, ceil(out*bits/32)) int32, packed along the outputs.
        bits: 2, 3, 4 or 8.
        out_features: number of zero points in a row.
        checkpoint_format: ``gptq`` or ``gptq_v2``.

    Returns:
        (groups, out) uint8 in {0, ..., 2**bits - 1}.

    Raises:
        ConfigError: an unsupported width or format.
    """
    check_bits(bits)
    words = jax.lax.bitcast_convert_type(jnp.asarray(qzeros), jnp.uint32)
    if check_format(checkpoint_format) == "gptq_v2":
        return unpack(words, bits, out_features, axis=-1)
    if bits in _WORD_OF_ONES:
        return unpack(words + np.uint32(_WORD_OF_ONES[bits]), bits, out_features, axis=-1)
    return (unpack(words, bits, out_features, axis=-1) + np.uint8(1)) & np.uint8(2**bits - 1)


def encode_zeros(zeros: ArrayLike, bits: int, checkpoint_format: str) -> jax.Array:
    """Stored words from true zero points; the inverse of :func:`decode_zeros`.

    Args:
        zeros: (groups, out) integers in {0, ..., 2**bits - 1}.
        bits: 2, 3, 4 or 8.
        checkpoint_format: ``gptq`` or ``gptq_v2``.

    Returns:
        (groups, ceil(out*bits/32)) int32.

    Raises:
        ConfigError: an unsupported width or format.
    """
    check_bits(bits)
    zeros = jnp.asarray(zeros).astype(jnp.uint8)
    if check_format(checkpoint_format) == "gptq_v2":
        return pack(zeros, bits, axis=-1)
    if bits in _WORD_OF_ONES:
        words = jax.lax.bitcast_convert_type(pack(zeros, bits, axis=-1), jnp.uint32)
        return jax.lax.bitcast_convert_type(words - np.uint32(_WORD_OF_ONES[bits]), jnp.int32)
    return pack((zeros - np.uint8(1)) & np.uint8(2**bits - 1), bits, axis=-1)
