"""How good a model is on rows it was not trained on."""

from lotaqaf_jax.evaluation.exact_match import HeldOut, evaluate

__all__ = ["HeldOut", "evaluate"]
