"""Packing: one contiguous little-endian bitstream of every width, along any axis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant import SUPPORTED_BITS, pack, packed_size, unpack

# (shape, packed axis). Every shape is compiled for, so there are few: one value; words that are not full; a 3-bit
# period exactly and one value more; several periods with a rest; both axes of a matrix, and leading axes.
SHAPES = (((1,), 0), ((10, 3), 0), ((3, 32), -1), ((2, 33), 1), ((2, 100, 3), -2), ((45, 2, 2), 0))


def big_int_words(values: list[int], bits: int) -> list[int]:
    """The definition: value i sits at bit i*bits of one long integer, cut into 32-bit words from the low end."""
    stream = sum(value << (i * bits) for i, value in enumerate(values))
    return [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(values) * bits // 32))]


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_pack_is_the_bitstream_and_unpack_its_inverse(bits: int, shape: tuple[int, ...], axis: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)
    words = np.asarray(pack(values, bits, axis))
    assert words.dtype == np.int32

    columns = np.moveaxis(values, axis, -1).reshape(-1, shape[axis])
    expected = np.array([big_int_words(column.tolist(), bits) for column in columns], np.uint32)
    found = np.ascontiguousarray(np.moveaxis(words, axis, -1)).reshape(len(columns), -1).view(np.uint32)
    np.testing.assert_array_equal(found, expected)

    again = unpack(words, bits, shape[axis], axis)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize("count", [33, 96])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_words_survive_unpack_and_pack(bits: int, count: int, seed: int) -> None:
    """Words with every bit in use come back as they were, whatever their sign; unused bits come back as 0."""
    words = np.random.default_rng(seed).integers(0, 2**32, (packed_size(count, bits), 2), np.uint32)
    words[-1] &= np.uint32(2 ** (count * bits - 32 * (len(words) - 1)) - 1)
    words = words.view(np.int32)
    np.testing.assert_array_equal(pack(unpack(words, bits, count), bits), words)
    np.testing.assert_array_equal(unpack(words.view(np.uint32), bits, count), unpack(words, bits, count))


def test_values_that_do_not_fit_lose_their_high_bits_and_leave_their_neighbours_alone() -> None:
    np.testing.assert_array_equal(unpack(pack(np.array([1, 255, 1]), 3), 3, 3), [1, 7, 1])


@pytest.mark.parametrize(("count", "bits", "words"), [(100, 4, 13), (32, 3, 3), (33, 3, 4), (1, 8, 1), (0, 2, 0)])
def test_packed_size(count: int, bits: int, words: int) -> None:
    assert packed_size(count, bits) == words


@pytest.mark.parametrize("bits", [0, 1, 5, 16, 4.0, True, "4", None])
def test_an_unsupported_width_is_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match=r"not a supported width; expected one of \(2, 3, 4, 8\)"):
        pack(np.zeros((8, 2), np.uint8), bits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not a supported width"):
        unpack(np.zeros((8, 2), np.int32), bits, 8)  # type: ignore[arg-type]


def test_the_wrong_number_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match="100 values of 4 bits need 13 words, found 12"):
        unpack(np.zeros((12, 2), np.int32), 4, 100)
