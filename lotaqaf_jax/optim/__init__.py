"""Optimizers for parameters with values in {-1, 0, 1}.

t-SignSGD is the optimizer of LoTA-QAF. Only the entries with the largest gradients of each tensor move, by one step of
the ternary grid, against the sign of their gradient. There is no learning rate; the share of entries that move falls
over the run.

`with_latents` lets any optimizer of optax train such parameters through float32 latents, and `ternary_adam` is that
with Adam: a value flips once the updates of many steps add up to it.
"""

from lotaqaf_jax.optim.latent import LatentState, ternary_adam, with_latents
from lotaqaf_jax.optim.schedules import Schedule, paper_schedule, reference_schedule
from lotaqaf_jax.optim.signsgd import TSignSGDState, t_signsgd

__all__ = [
    "LatentState",
    "Schedule",
    "TSignSGDState",
    "paper_schedule",
    "reference_schedule",
    "t_signsgd",
    "ternary_adam",
    "with_latents",
]
