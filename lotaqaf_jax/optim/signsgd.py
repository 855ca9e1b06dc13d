"""t-SignSGD as an optax gradient transformation."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lotaqaf_jax.optim.checks import check_grads, check_ternary, check_type, is_none, name
from lotaqaf_jax.optim.quantile import kth_largest, lower_neighbour
from lotaqaf_jax.optim.schedules import (
    Schedule,
    checked_total_steps,
    in_last_fifth,
    paper_schedule,
    reference_schedule,
)

__all__ = ["TSignSGDState", "t_signsgd"]

_LARGE_NORM = 10.0
_LARGE_ONE_IN = 20_000  # the tail above the quantile level 0.99995, inverted


class TSignSGDState(NamedTuple):
    """State of `t_signsgd`.

    Attributes:
      count: () int32, the number of updates made so far.
      average: the running average of the gradients, shaped like the parameters; None where there is no
        ``beta``.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, which tuple has as a method
    average: Any = None


def t_signsgd(
    total_steps: int | jax.Array | None,
    schedule: str | float | jax.Array | Schedule = "reference",
    *,
    tau: float | jax.Array = 1e-9,
    beta: float | jax.Array | None = None,
    stacked_axes: int | Callable[[Any, Any], int] | None = None,
    skip_large: bool | None = None,
    accumulator_dtype: Any = None,
    check: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""t-SignSGD: sign descent on ternary parameters, for the largest gradients of each tensor only.

    At step t = 1, 2, ..., for each tensor P of the parameters, with gradient g:

    .. math::
      P \leftarrow \mathrm{clip}(P - \mathrm{sign}(g) \cdot 1[|g| > \max(\tau, \sigma_t)], -1, 1)

    where :math:`\sigma_t` is the quantile of |g| over that one tensor, linearly interpolated, at the level
    one minus ``schedule(t)``, and :math:`\tau` is ``tau``. There is no learning rate.

    With ``beta``, g is replaced by the average over the steps so far, :math:`m_t / (1 - \beta^t)` with
    :math:`m_t = \beta m_{t-1} + (1 - \beta) g_t`. The bias correction changes neither signs nor order; it
    keeps the scale, so that tau means the same at every step.

    With ``skip_large``, in the last 20 % of ``total_steps`` and if the norm of all gradients together exceeds
    10, the entries with |g| at or above the 0.99995 quantile of their tensor do not move either.

    Magnitudes are compared in float32. An entry whose |g| equals the quantile does not move: in a tensor with
    a single entry, or with all |g| equal, nothing does. A tensor with a NaN or infinite gradient does not
    move in that step, as its order is unknown. With ``beta`` such a value stays in the average and the tensor
    never moves again: a training loop has to look for it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from lotaqaf_jax.optim import t_signsgd
      >>> target = jnp.array([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
      >>> weight = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
      >>> loss = lambda params: jnp.sum(weight * (params["A"] - target) ** 2)
      >>> params = {"A": jnp.zeros((2, 3), jnp.int8)}
      >>> optimizer = t_signsgd(total_steps=4)
      >>> state = optimizer.init(params)
      >>> for _ in range(4):
      ...     grads = jax.grad(loss)(optax.tree.cast(params, jnp.float32))
      ...     updates, state = optimizer.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print("loss", loss(params))
      loss 9.0
      loss 4.0
      loss 1.0
      loss 0.0
      >>> params["A"].tolist()
      [[1, 0, -1], [0, 1, 1]]

    References:
      "LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning",
      https://arxiv.org/abs/2505.18724, Eq. 6. The schedule "reference" and ``skip_large`` are from its
      authors' code; ``beta`` is in neither.

    .. note::
      Under ``optax.inject_hyperparams``, ``tau``, ``beta``, ``total_steps`` and a number as ``schedule`` can
      be injected. Name ``stacked_axes`` and a callable ``schedule`` in its ``static_args``, and give it
      ``hyperparam_dtype=jnp.float32``: else it casts tau and beta to the type of the parameters. Under
      ``optax.masked`` and ``optax.multi_transform`` the norm for ``skip_large`` is that of the gradients that
      arrive here.

    Args:
      total_steps: S, the number of updates that the schedule spans; later ones stay at its last level. None
        only where neither ``schedule`` nor ``skip_large`` needs it.
      schedule: "reference" (`reference_schedule`), "paper" (`paper_schedule`), one number for all steps, or a
        traceable function of t = 1, 2, .... Numbers are tails in [0, 1]: at 0.05 the top 5 % move.
      tau: entries with |g| <= tau do not move.
      beta: decay of the average of the gradients, in [0, 1). None, or a plain 0.0, is the published rule,
        without an average in the state. An array keeps an average whatever its value: the state's structure
        has to be static.
      stacked_axes: how many leading axes index separate tensors, 1 for layers stacked as (layers, in, rank):
        an int, or a function of (key path, parameter). None is 0.
      skip_large: whether to skip large gradients late in the run. None: for the schedule "reference" only.
      accumulator_dtype: type of the average. None is float32.
      check: whether ``init`` refuses parameters that are not ternary. Under ``jax.jit`` their values are
        unknown, and nothing is checked.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Parameters are a pytree of arrays of any shape, of a float
      or signed integer type, with values in {-1, 0, 1}. Gradients have the same structure and shapes, and a
      float type. Updates have the parameters' types, and ``optax.apply_updates`` gives the equation above
      exactly. A parameter whose gradient is None stays as it is.

    Raises:
      ValueError: total_steps missing or below 1, an unknown schedule, or tau, beta or a tail out of range. By
        ``init``: a parameter of another type or, with ``check``, not ternary. By ``update``: no parameters, a
        gradient of another shape or not of a float type, or stacked_axes out of range or traced.
      TypeError: total_steps is neither an integer nor a JAX array.
    """
    if total_steps is not None:
        total_steps = checked_total_steps(total_steps)
    elif isinstance(schedule, str) or skip_large:
        raise ValueError("total_steps is None: only a number or a function as schedule works without it.")
    if isinstance(tau, int | float) and not tau >= 0:
        raise ValueError(f"tau is {tau}, expected 0 or more.")
    if isinstance(beta, int | float) and not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}, expected a decay in [0, 1).")
    if isinstance(beta, int | float) and beta == 0:
        beta = None
    if skip_large is None:
        skip_large = isinstance(schedule, str) and schedule == "reference"
    quantile_rank = _rank_rule(schedule, total_steps)

    def init(params: Any) -> TSignSGDState:
        for path, param in jax.tree_util.tree_leaves_with_path(params):
            check_type(path, param)
            if check and not isinstance(param, jax.core.Tracer):
                check_ternary(path, param)
        average = None
        if beta is not None:
            average = optax.tree.zeros_like(params, dtype=accumulator_dtype or jnp.float32)
        return TSignSGDState(jnp.zeros([], jnp.int32), average)

    def update(updates: Any, state: TSignSGDState, params: Any = None, **extra_args: Any) -> tuple[Any, TSignSGDState]:
        del extra_args
        check_grads("t_signsgd", updates, params)
        step = optax.safe_increment(state.count)
        average = state.average
        if beta is not None:
            average = _map(lambda g, m: m if g is None else _decay(m, g, beta), updates, average)
            updates = _map(lambda g, m: None if g is None else m / (1 - beta**step), updates, average)
        skip: Any = False
        if skip_large:
            norm = optax.tree.norm(optax.tree.cast(updates, jnp.float32))
            skip = in_last_fifth(step, total_steps) & (norm > _LARGE_NORM)

        def difference(path: Any, grad: Any, param: Any) -> Any:
            """Parameter after the step, less the parameter."""
            if param is None:
                return None
            if grad is None or param.size == 0:
                return jnp.zeros_like(param)
            axes = tuple(range(_leading_axes(stacked_axes, path, param), param.ndim))
            entries = math.prod(param.shape[axis] for axis in axes)
            magnitude = jnp.abs(grad.astype(jnp.float32))
            sigma = kth_largest(magnitude, quantile_rank(entries, step), axes)
            finite = jnp.isfinite(magnitude).all(axis=axes, keepdims=True)
            moves = finite & (magnitude > jnp.maximum(tau, sigma))
            if skip_large:
                upper_neighbour = (entries - 1) // _LARGE_ONE_IN
                # Looked for only where it is needed, since it takes as long as the threshold itself.
                largest = jax.lax.cond(
                    skip,
                    lambda: kth_largest(magnitude, upper_neighbour, axes),
                    lambda: jnp.full_like(sigma, jnp.inf),
                )
                moves &= magnitude < largest
            sign = jnp.where(moves, jnp.sign(grad), 0).astype(param.dtype)
            return jnp.clip(param - sign, -1, 1) - param

        differences = jax.tree_util.tree_map_with_path(difference, updates, params, is_leaf=is_none)
        return differences, TSignSGDState(step, average)

    return optax.GradientTransformationExtraArgs(init, update)


def _rank_rule(schedule: Any, total_steps: Any) -> Callable[[int, jax.Array], jax.Array]:
    """A function of (entries of a tensor, step t): the rank of the entry that stands for the quantile."""
    tails = None  # host: those of t = 1, 2, ..., the last one for all later steps
    if isinstance(schedule, str):
        named = {"reference": reference_schedule, "paper": paper_schedule}
        if schedule not in named:
            raise ValueError(f"schedule is {schedule!r}, expected {' or '.join(named)}, a number or a function.")
        schedule = named[schedule](total_steps)
        if isinstance(total_steps, int):
            tails = schedule(np.arange(1, total_steps + 1))
    elif isinstance(schedule, int | float):
        if not 0 <= schedule <= 1:
            raise ValueError(f"schedule is {schedule}, expected a tail in [0, 1].")
        tails = np.array([schedule], np.float64)

    def rank(entries: int, step: jax.Array) -> jax.Array:
        if tails is None:
            tail = schedule(step) if callable(schedule) else schedule
            return lower_neighbour(jnp.asarray(tail, jnp.float32), entries)
        # Every level is known: count on the host, in float64, where the rank is exact.
        return jnp.asarray(lower_neighbour(tails, entries))[jnp.minimum(step, len(tails)) - 1]

    return rank


def _decay(average: jax.Array, grad: jax.Array, beta: Any) -> jax.Array:
    return (beta * average + (1 - beta) * grad.astype(average.dtype)).astype(average.dtype)


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(function, *trees, is_leaf=is_none)


def _leading_axes(stacked_axes: Any, path: Any, param: jax.Array) -> int:
    number = stacked_axes(path, param) if callable(stacked_axes) else stacked_axes
    if isinstance(number, jax.core.Tracer):
        raise ValueError(
            "stacked_axes is traced, expected an int: name it in the static_args of optax.inject_hyperparams."
        )
    number = 0 if number is None else operator.index(number)
    if not 0 <= number <= param.ndim:
        raise ValueError(
            f"stacked_axes is {number} for parameter {name(path)} of shape {param.shape}, expected 0 to {param.ndim}."
        )
    return number
