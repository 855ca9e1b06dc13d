"""Intervals against scipy, closed values, and what they promise: to hold the truth 95 times in 100."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from lotaqaf_jax.evaluation import Measure, Share, bootstrap_interval, wilson_interval


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_is_scipys(counts: tuple[int, int]) -> None:
    expected = binomtest(*counts).proportion_ci(0.95, method="wilson")
    assert wilson_interval(*counts) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_of_no_row_right() -> None:
    """Closed: the upper end of 0 of n is z**2 / (n + z**2)."""
    z = 1.959963984540054
    assert wilson_interval(0, 10) == (0.0, pytest.approx(z**2 / (10 + z**2)))
    assert wilson_interval(10, 10)[1] == 1.0


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.73])
def test_wilson_holds_the_truth_as_often_as_it_says(truth: float) -> None:
    total = 400
    chance = binom.pmf(np.arange(total + 1), total, truth)
    holds = [low <= truth <= high for low, high in (wilson_interval(k, total) for k in range(total + 1))]
    assert chance[holds].sum() == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_what_is_no_share(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="not a share"):
        wilson_interval(correct, total)


def test_bootstrap_is_near_the_normal_interval_of_a_mean() -> None:
    """With counts of one the ratio is a mean, whose normal interval is known."""
    rng = np.random.default_rng(3)
    values = rng.exponential(2.0, 800)
    low, high = bootstrap_interval(values, np.ones(800)) or (0, 0)
    half = 1.96 * values.std(ddof=1) / np.sqrt(800)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_bootstrap_of_a_ratio_holds_the_truth_as_often_as_it_says() -> None:
    """Units of unlike size, whose numerator goes with the size: the ratio is not the mean of the units' ratios."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        counts = rng.integers(1, 200, 150)
        sums = counts * rng.normal(2.0, 0.5, 150)
        low, high = bootstrap_interval(sums, counts, resamples=500) or (0, 0)
        held += low <= 2.0 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_bootstrap_goes_by_its_seed() -> None:
    values, counts = np.arange(1.0, 30.0), np.arange(2, 31)
    assert bootstrap_interval(values, counts, seed=1) == bootstrap_interval(values, counts, seed=1)
    assert bootstrap_interval(values, counts, seed=1) != bootstrap_interval(values, counts, seed=2)
    assert bootstrap_interval([3.0] * 5, [2] * 5) == pytest.approx((1.5, 1.5))


def test_one_unit_tells_nothing_about_spread() -> None:
    assert bootstrap_interval([3.0], [2]) is None


def test_a_share_as_a_measure() -> None:
    share = Share(3, 4)
    measure = Measure.of("exact_match", share)
    assert (measure.value, measure.interval, measure.total) == (0.75, wilson_interval(3, 4), 4)
    assert str(share) == "75.0 % of 4 (30.1 to 95.4)"
