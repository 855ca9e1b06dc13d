"""How good a model is on rows it was not trained on."""

from lotaqaf_jax.evaluation.exact_match import HeldOut, evaluate
from lotaqaf_jax.evaluation.generated import GeneratedMatch, generated_match

__all__ = ["GeneratedMatch", "HeldOut", "evaluate", "generated_match"]
