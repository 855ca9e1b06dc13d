"""Packed integer weights: their layout, the GPTQ files, and the pytree that holds them."""

from lotaqaf_jax.quant.packing import SUPPORTED_BITS, pack, packed_size, unpack
from lotaqaf_jax.quant.weight import QuantizedWeight
from lotaqaf_jax.quant.zeros import decode_zeros, encode_zeros

__all__ = [
    "SUPPORTED_BITS",
    "QuantizedWeight",
    "decode_zeros",
    "encode_zeros",
    "pack",
    "packed_size",
    "unpack",
]
