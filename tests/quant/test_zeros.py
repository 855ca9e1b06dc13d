"""Zero points as GPTQ files store them: v1 with its borrows, v2 as they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant import SUPPORTED_BITS, decode_zeros, encode_zeros, packed_size

OUT = (44,)  # the last word is not full in any width; whole words are in the tests below
FORMATS = ("gptq", "gptq_v2")


def stored_words(zeros: np.ndarray, bits: int, checkpoint_format: str) -> np.ndarray:
    """The definition, in Python integers: what a GPTQ writer stores for one row of true zeros."""
    if checkpoint_format == "gptq" and bits == 3:
        zeros = (zeros.astype(int) - 1) % 8
    stream = sum(int(zero) << (i * bits) for i, zero in enumerate(zeros))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(zeros) * bits // 32))]
    if checkpoint_format == "gptq" and bits != 3:
        one_in_every_field = sum(1 << (i * bits) for i in range(32 // bits))
        words = [(word - one_in_every_field) % 2**32 for word in words]
    return np.array(words, np.uint32).view(np.int32)


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("out", OUT)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@settings(max_examples=10, deadline=None)
@given(share=st.sampled_from([1.0, 0.5]), seed=st.integers(0, 2**32 - 1))
def test_encode_is_what_writers_store_and_decode_its_inverse(
    bits: int, out: int, checkpoint_format: str, share: float, seed: int
) -> None:
    """With ``share`` below 1 many zeros are 0, so that v1's borrows run through several fields and off the word."""
    rng = np.random.default_rng(seed)
    zeros = (rng.integers(0, 2**bits, (3, out)) * (rng.random((3, out)) < share)).astype(np.uint8)
    words = encode_zeros(zeros, bits, checkpoint_format)
    np.testing.assert_array_equal(words, [stored_words(row, bits, checkpoint_format) for row in zeros])
    decoded = decode_zeros(words, bits, out, checkpoint_format)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, zeros)


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_stored_words_survive_decode_and_encode(bits: int, checkpoint_format: str, seed: int) -> None:
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (3, packed_size(64, bits))).astype(np.int32)
    again = encode_zeros(decode_zeros(words, bits, 64, checkpoint_format), bits, checkpoint_format)
    np.testing.assert_array_equal(again, words)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_symmetric_zero_is_stored_one_less(bits: int) -> None:
    middle = 2 ** (bits - 1)
    stored = encode_zeros(np.full((1, 32), middle), bits, "gptq")
    np.testing.assert_array_equal(decode_zeros(stored, bits, 32, "gptq_v2"), np.full((1, 32), middle - 1))


def test_a_borrow_crosses_fields() -> None:
    """0x00000000 - 0x11111111 is 0xEEEEEEEF: read field by field, seven of eight zeros would be 15."""
    stored = encode_zeros(np.zeros((1, 8), np.uint8), 4, "gptq")
    assert np.asarray(stored).view(np.uint32)[0, 0] == 0xEEEEEEEF
    np.testing.assert_array_equal(decode_zeros(stored, 4, 8, "gptq"), np.zeros((1, 8)))


def test_leading_axes_are_kept() -> None:
    zeros = np.random.default_rng(0).integers(0, 16, (2, 3, 16))
    for checkpoint_format in FORMATS:
        words = encode_zeros(zeros, 4, checkpoint_format)
        assert words.shape == (2, 3, 2)
        np.testing.assert_array_equal(decode_zeros(words, 4, 16, checkpoint_format), zeros)


def test_the_planar_format_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'gptq_p' \(bit-planar words"):
        decode_zeros(np.zeros((1, 1), np.int32), 4, 8, "gptq_p")
    with pytest.raises(ConfigError, match="'marlin' cannot be read"):
        encode_zeros(np.zeros((1, 8), np.int32), 4, "marlin")
