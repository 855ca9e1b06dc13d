"""AdamW for the adapters of LoRA and QA-LoRA, with a learning rate that may rise and fall."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import optax

__all__ = ["Scheduler", "adamw", "learning_rates"]

Scheduler = Literal["constant", "linear", "cosine"]


def learning_rates(peak: float, total_steps: int, *, scheduler: Scheduler, warmup_ratio: float = 0.0) -> optax.Schedule:
    """The learning rate of every step, by how many came before it.

        rise = ceil(warmup_ratio * total_steps)
        n < rise:   peak * n / rise
        after:      peak                                                      "constant"
                    peak * (1 - p)                                            "linear"
                    peak * (1 + cos(pi * p)) / 2                              "cosine"
        with p = (n - rise) / (total_steps - rise), at most 1

    Args:
        peak: the largest learning rate.
        total_steps: the steps of the run.
        scheduler: what follows the rise.
        warmup_ratio: share of the steps that the rise takes, in [0, 1).

    Returns:
        A function of n = 0, 1, ....

    Source: the schedules of transformers' ``get_scheduler``, where "constant" with a warmup is "constant_with_warmup".
    """
    rise = math.ceil(warmup_ratio * total_steps)

    def rate(count: optax.ScalarOrArray) -> optax.ScalarOrArray:
        n = jnp.asarray(count, jnp.float32)
        done = jnp.clip((n - rise) / max(1, total_steps - rise), 0.0, 1.0)
        after = {"constant": jnp.ones(()), "linear": 1 - done, "cosine": (1 + jnp.cos(math.pi * done)) / 2}
        return peak * jnp.where(n < rise, n / max(1, rise), after[scheduler])

    return rate


def adamw(
    rates: optax.Schedule, *, max_grad_norm: float = 0.3, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW with betas 0.9 and 0.999 and eps 1e-8, of gradients scaled down to a norm.

    Args:
        rates: the learning rate by step, of :func:`learning_rates`.
        max_grad_norm: the gradients of all adapters together are scaled down to this norm where theirs is larger; 0 for
            never.
        weight_decay: share of the parameters, times the learning rate, that is taken off in a step.

    Returns:
        An Optax transformation; its moments have the parameters' type and twice their size.

    Source: AdamW, arXiv 1711.05101; the values are torch's, and max_grad_norm that of the LoTA-QAF paper's baselines.
    """
    steps = optax.adamw(rates, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), steps) if max_grad_norm else steps
