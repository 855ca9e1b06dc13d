"""Training of adapters: settings, methods, step, loop, checkpoints and logs."""

from lotaqaf_jax.training.config import TrainConfig, parse_config
from lotaqaf_jax.training.loop import Stopped, train
from lotaqaf_jax.training.methods import METHODS, Method, method_of, summary
from lotaqaf_jax.training.output import prepare_output
from lotaqaf_jax.training.step import TrainState, make_train_step

__all__ = [
    "METHODS",
    "Method",
    "Stopped",
    "TrainConfig",
    "TrainState",
    "make_train_step",
    "method_of",
    "parse_config",
    "prepare_output",
    "summary",
    "train",
]
