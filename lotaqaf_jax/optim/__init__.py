"""t-SignSGD: the optimizer of LoTA-QAF for parameters with values in {-1, 0, 1}.

Only the entries with the largest gradients of each tensor move, by one step of the ternary grid, against the
sign of their gradient. There is no learning rate; the share of entries that move falls over the run.
"""

from lotaqaf_jax.optim.schedules import Schedule, paper_schedule, reference_schedule
from lotaqaf_jax.optim.signsgd import TSignSGDState, t_signsgd

__all__ = ["Schedule", "TSignSGDState", "paper_schedule", "reference_schedule", "t_signsgd"]
