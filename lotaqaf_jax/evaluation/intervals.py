"""How sure a measured number is: 95 % intervals for shares and for means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["Interval", "Measure", "Share", "bootstrap_interval", "wilson_interval"]

Interval = tuple[float, float]
"""Lower and upper end."""

# The 97.5 % quantile of the normal distribution: an interval of 95 %.
_Z = 1.959963984540054

_DRAWN_AT_ONCE = 2**22


def wilson_interval(correct: int, total: int) -> Interval:
    """The 95 % score interval of a share p = correct / total, as if the rows were drawn independently.

        (p + z**2 / 2n -+ z sqrt(p (1 - p) / n + z**2 / 4n**2)) / (1 + z**2 / n),  n = total, z = 1.96

    Raises:
        ValueError: ``total`` is not positive, or ``correct`` is not between 0 and ``total``.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is not a share")
    p, more = correct / total, _Z**2 / total
    middle = p + more / 2
    half = math.sqrt(p * (1 - p) * more + more**2 / 4)
    # At the ends the formula gives 0 and 1 but for the last digit.
    low = 0.0 if correct == 0 else (middle - half) / (1 + more)
    high = 1.0 if correct == total else (middle + half) / (1 + more)
    return low, high


def bootstrap_interval(
    sums: Sequence[float], counts: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """The 95 % interval of sum(sums) / sum(counts), for units (documents, windows) drawn independently.

    The units are drawn anew, with replacement, ``resamples`` times; the interval goes from the 2.5 % to the 97.5 %
    quantile of the ratios found.

    Args:
        sums: what each unit adds to the numerator, (units,).
        counts: what it adds to the denominator, (units,).
        resamples: how often to draw.
        seed: of the draws.

    Returns:
        The interval, or None for fewer than two units, which tell nothing about their spread.

    Source: the percentile bootstrap; B. Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    pairs = np.stack([np.asarray(sums, np.float64), np.asarray(counts, np.float64)], axis=1)
    units = len(pairs)
    if units < 2:
        return None
    rng = np.random.default_rng(seed)
    ratios: list[np.ndarray] = []
    for start in range(0, resamples, step := max(1, _DRAWN_AT_ONCE // units)):
        times = rng.multinomial(units, np.full(units, 1 / units), size=min(step, resamples - start))
        drawn = times @ pairs
        ratios.append(drawn[:, 0] / drawn[:, 1])
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Share:
    """``correct`` of ``total`` rows."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """correct / total."""
        return self.correct / self.total

    @property
    def interval(self) -> Interval:
        """Its :func:`wilson_interval`."""
        return wilson_interval(self.correct, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % of {self.total:,} ({100 * low:.1f} to {100 * high:.1f})"


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a result, for tables and files.

    Attributes:
        name: such as ``exact_match`` or ``perplexity``.
        value: the number; a share is between 0 and 1.
        interval: of 95 %, or None.
        total: how many it was measured on.
        unit: what these are: rows, tokens, windows.
        is_share: whether it is a share, which tables show in percent.
        detail: whether it is for files alone, and not for a table.
    """

    name: str
    value: float
    interval: Interval | None
    total: int
    unit: str
    is_share: bool = False
    detail: bool = False

    @classmethod
    def of(cls, name: str, share: Share, unit: str = "rows", *, detail: bool = False) -> Measure:
        """A share as a measure."""
        return cls(name, share.value, share.interval, share.total, unit, is_share=True, detail=detail)
