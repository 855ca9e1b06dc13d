"""Percentile schedules: which share of the entries of a tensor moves at each step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Schedule", "paper_schedule", "reference_schedule"]

Schedule = Callable[[Any], Any]
"""Maps the step t = 1, 2, ... to the tail, which is one minus the quantile level: 0.05 for the top 5 %."""


def reference_schedule(total_steps: int | jax.Array) -> Schedule:
    """Tail of |g| that moves, as in the authors' code.

    With S = ``total_steps``: falls linearly from 0.05 at t = 0 to 0.001 at t = 0.8 S, then linearly to 0.0001
    at t = S, and stays there.

    Example:
      >>> tail = reference_schedule(10)
      >>> [round(float(tail(t)), 6) for t in (4, 8, 9, 10, 11)]
      [0.0255, 0.001, 0.00055, 0.0001, 0.0001]

    References:
      The authors' code for the paper named at `paper_schedule`, which has it as quantile levels: 0.95 to
      0.999, then to 0.9999.

    Args:
      total_steps: S, the number of updates of the run, at least 1. A JAX array may be traced.

    Returns:
      A function of the step t, a number or an array of any shape, to the tail of the same shape. It computes
      with numpy in float64, or with JAX in its default float type where t or S is a JAX array.

    Raises:
      ValueError: total_steps is an integer below 1.
      TypeError: total_steps is neither an integer nor a JAX array.
    """
    total_steps = checked_total_steps(total_steps)

    def tail(step: Any) -> Any:
        xp = _namespace(step, total_steps)
        return xp.interp(step, xp.asarray([0.0, 0.8 * total_steps, total_steps]), xp.asarray([0.05, 0.001, 0.0001]))

    return tail


def paper_schedule(total_steps: int | jax.Array) -> Schedule:
    """Tail of |g| that moves, as in the paper.

    With S = ``total_steps``: falls linearly from 0.05 at t = 0 to 0.001 at t = 0.8 S, and is 0.0001 after.

    Example:
      >>> tail = paper_schedule(10)
      >>> [round(float(tail(t)), 6) for t in (4, 8, 9, 10, 11)]
      [0.0255, 0.001, 0.0001, 0.0001, 0.0001]

    References:
      "LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning", https://arxiv.org/abs/2505.18724

    Args:
      total_steps: S, the number of updates of the run, at least 1. A JAX array may be traced.

    Returns:
      A function of the step t, as for `reference_schedule`.

    Raises:
      ValueError: total_steps is an integer below 1.
      TypeError: total_steps is neither an integer nor a JAX array.
    """
    total_steps = checked_total_steps(total_steps)

    def tail(step: Any) -> Any:
        xp = _namespace(step, total_steps)
        falling = xp.interp(step, xp.asarray([0.0, 0.8 * total_steps]), xp.asarray([0.05, 0.001]))
        return xp.where(in_last_fifth(step, total_steps), 0.0001, falling)

    return tail


def in_last_fifth(step: Any, total_steps: Any) -> Any:
    """Whether t > 0.8 S. Exact: where 0.8 S is an integer, its product in floating point is that integer."""
    return step > 0.8 * total_steps


def checked_total_steps(total_steps: Any) -> Any:
    """total_steps as an int of at least 1, or unchanged if it is a JAX array: its value may be unknown."""
    if isinstance(total_steps, jax.Array):
        return total_steps
    total_steps = operator.index(total_steps)
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}, expected at least 1.")
    return total_steps


def _namespace(*values: Any) -> Any:
    return jnp if any(isinstance(value, jax.Array) for value in values) else np
