"""Words of other formats as GPTQ's, and back: against decoders that read one value at a time."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.quant.formats import awq, compressed, mlx
from lotaqaf_jax.quant.formats.stream import pack_rows, unpack_rows
from tests.quant.formats import foreign

seeds = st.integers(0, 2**32 - 1)
widths = st.sampled_from([2, 3, 4, 8])


@given(seeds, widths, st.integers(1, 5), st.integers(1, 70))
def test_rows_of_a_stream(seed: int, bits: int, rows: int, count: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, count))
    words = pack_rows(values, bits)
    np.testing.assert_array_equal(words, foreign.stream(values, bits))
    np.testing.assert_array_equal(unpack_rows(words, bits, count), values)


@given(seeds, st.integers(1, 40), st.integers(1, 6))
def test_awq_words(seed: int, n_in: int, columns: int) -> None:
    """Any number of inputs: GPTQ's last word need not be full."""
    values = np.random.default_rng(seed).integers(0, 16, (n_in, 8 * columns))
    theirs = foreign.awq_words(values)
    ours = awq.to_gptq(theirs)
    np.testing.assert_array_equal(ours, foreign.stream(values.T, 4).T)
    np.testing.assert_array_equal(awq.words(ours, n_in), theirs)


@pytest.mark.parametrize("words", [1, awq._BLOCK // 8, awq._BLOCK // 8 + 3])
def test_awq_words_of_several_blocks(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of any length turn over the same words; a wide matrix goes row of words by row of words."""
    theirs = np.random.default_rng(0).integers(-(2**31), 2**31, (444, 6), dtype=np.int32)
    whole = awq.to_gptq(theirs)
    monkeypatch.setattr(awq, "_BLOCK", 100)
    np.testing.assert_array_equal(awq.to_gptq(theirs), whole)
    np.testing.assert_array_equal(awq.words(whole, 444), theirs)
    wide = np.random.default_rng(1).integers(-(2**31), 2**31, (8, words), dtype=np.int32)
    np.testing.assert_array_equal(awq.words(awq.to_gptq(wide), 8), wide)


@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_awq_zero_points_have_no_minus_one(seed: int, groups: int, columns: int) -> None:
    zeros = np.random.default_rng(seed).integers(0, 16, (groups, 8 * columns))
    words = awq.to_gptq_zeros(foreign.awq_words(zeros))
    np.testing.assert_array_equal(foreign.unstream(words, 4, 8 * columns), zeros)


@given(seeds, widths, st.integers(1, 70), st.integers(1, 20))
def test_compressed_words(seed: int, bits: int, n_in: int, n_out: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (n_in, n_out))
    theirs = foreign.compressed(values, np.zeros((1, n_out), int), np.ones((1, n_out)), bits)
    ours = compressed.to_gptq(theirs["weight_packed"])
    np.testing.assert_array_equal(foreign.unstream(ours.T, bits, n_in).T, values)
    np.testing.assert_array_equal(compressed.words(ours), theirs["weight_packed"])
    zeros = compressed.to_gptq(theirs["weight_zero_point"])
    np.testing.assert_array_equal(foreign.unstream(zeros, bits, n_out), np.zeros((1, n_out)))
    middle = compressed.symmetric_zeros(3, n_out, bits)
    np.testing.assert_array_equal(foreign.unstream(middle, bits, n_out), np.full((3, n_out), 2 ** (bits - 1)))


@given(seeds, widths, st.integers(1, 3), st.integers(1, 9))
def test_mlx_words(seed: int, bits: int, words: int, n_out: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (32 * words, n_out))
    theirs = foreign.mlx(values, np.zeros((1, n_out)), np.ones((1, n_out), np.float32), bits)["weight"]
    ours = mlx.to_gptq(theirs)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(foreign.unstream(ours.T, bits, 32 * words).T, values)
    np.testing.assert_array_equal(mlx.words(ours), theirs)
    assert mlx.words(ours).dtype == np.uint32


@given(seeds, st.sampled_from([2, 3, 4]), st.sampled_from(["float16", "bfloat16", "float32"]))
def test_mlx_zero_points(seed: int, bits: int, dtype: str) -> None:
    """Scales of either sign are biases / -z, rounded: z is found again, and the residual is the rounding's."""
    rng = np.random.default_rng(seed)
    zeros = rng.integers(1, 2**bits, (5, 4))
    biases = foreign.rounded(rng.uniform(0.01, 1, zeros.shape) * rng.choice([-1, 1], zeros.shape), dtype)
    scales = foreign.rounded(-biases.astype(np.float64) / zeros, dtype)
    found, residual = mlx.zero_points(scales, biases, bits, "m")
    np.testing.assert_array_equal(found, zeros)
    exact = -biases.astype(np.float64) / scales.astype(np.float64)
    assert residual == pytest.approx(np.abs(exact - zeros).max(), abs=1e-6)
    assert residual <= (2**bits - 1) * float(ml_dtypes.finfo(scales.dtype).eps) / 2 * 1.01 + 1e-6


def test_mlx_groups_of_zeros() -> None:
    zeros = np.zeros((1, 1), np.float16)
    for scale in (0, 1e-7, -1e-7):
        found, residual = mlx.zero_points(np.full((1, 1), scale, np.float16), zeros, 4, "m")
        assert (found.item(), residual) == (0, 0)


@pytest.mark.parametrize(
    ("scale", "bias", "message"),
    [
        (0.5, 0.5, r"m.biases: 1 of 2 zero points -biases/scales lie outside 0 to 15, the first, -1, at \(1, 0\)"),
        (0.5, -8, r"the first, 16, at \(1, 0\): the grid of that group does not hold 0"),
        (0.0, 1, r"the first, -inf, at"),
        (0.5, -1.05, r"m.biases: -biases/scales is up to 0.1 of a step from an integer zero point"),
    ],
)
def test_mlx_grids_that_are_none_of_ours(scale: float, bias: float, message: str) -> None:
    scales, biases = (np.array([[good], [bad]], np.float32) for good, bad in ((1, scale), (-3, bias)))
    with pytest.raises(CheckpointError, match=message):
        mlx.zero_points(scales, biases, 4, "m")


@given(seeds, widths, st.sampled_from(["float16", "bfloat16", "float32"]))
def test_mlx_dequantised(seed: int, bits: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 2**bits, (64, 7))
    scales, biases = (foreign.rounded(rng.normal(size=(7, 2)), dtype) for _ in range(2))
    found = mlx.dequantize(foreign.stream(q.T, bits).view(np.uint32), scales, biases, bits, 32)
    assert found.dtype == scales.dtype
    scale, bias = (np.repeat(part.astype(np.float64), 32, axis=1) for part in (scales, biases))
    rounding = float(ml_dtypes.finfo(found.dtype).eps)
    tolerance = rounding * (np.abs(scale) * q.T + np.abs(bias))
    assert np.all(np.abs(found.astype(np.float64) - (scale * q.T + bias)) <= tolerance + 1e-7)


@pytest.mark.parametrize("turn", [awq.to_gptq, lambda words: awq.words(words, 8 * len(words))])
def test_what_is_given_stays(turn: Callable[[np.ndarray], np.ndarray]) -> None:
    """The input is a read-only view of a file."""
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (16, 16), dtype=np.int32)
    before = words.copy()
    words.flags.writeable = False
    turn(words)
    np.testing.assert_array_equal(words, before)
