"""Numbers that a user gives, looked at before anything is compiled."""

from __future__ import annotations

import math
import operator
from typing import Any

from lotaqaf_jax.errors import ConfigError

__all__ = ["integer", "number"]


def number(name: str, value: Any, expected: str, least: float, most: float = math.inf) -> float:
    """``value`` as a float from ``least`` to ``most``.

    Raises:
        ConfigError: it is not a finite number of this range; the sentence says what was ``expected``.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (least <= found <= most and math.isfinite(found)):
        raise ConfigError(f"{name}: found {value!r}, expected {expected}.")
    return found


def integer(name: str, value: Any, expected: str, least: int, most: int = 2**63) -> int:
    """``value`` as an int from ``least`` to ``most``.

    Raises:
        ConfigError: it is not a whole number of this range; the sentence says what was ``expected``.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if isinstance(value, bool) or not least <= found <= most:
        raise ConfigError(f"{name}: found {value!r}, expected {expected}.")
    return found
