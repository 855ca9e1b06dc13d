"""How good a model is on rows it was not trained on.

:func:`perplexity` and :func:`document_perplexity` on text, :func:`exact_match` by greedy generation and a rule of
:data:`RULES`, :func:`mmlu` by option likelihood; :func:`evaluate` by one forward pass, as training looks at its
held-out rows. ``python evaluate.py`` runs them from the shell; :mod:`~.lm_eval` hands a model to lm-eval's own tasks.
"""

from lotaqaf_jax.evaluation.config import EvalConfig, parse_eval_config
from lotaqaf_jax.evaluation.generated import Answer, ExactMatch, GeneratedMatch, exact_match, generated_match
from lotaqaf_jax.evaluation.held_out import HeldOut, evaluate
from lotaqaf_jax.evaluation.intervals import Measure, Share, bootstrap_interval, wilson_interval
from lotaqaf_jax.evaluation.likelihood import Scored, Span, log_likelihoods, next_token_scores
from lotaqaf_jax.evaluation.mmlu_data import MmluData, Question, load_mmlu, mmlu_prompt
from lotaqaf_jax.evaluation.multiple_choice import Choice, Mmlu, mmlu
from lotaqaf_jax.evaluation.rules import RULES, Rule, gsm8k_answer, viggo_representation
from lotaqaf_jax.evaluation.tasks import TASKS, Task, TaskResult, load_task
from lotaqaf_jax.evaluation.text_loss import Perplexity, UnitLoss, document_perplexity, perplexity

__all__ = [
    "RULES",
    "TASKS",
    "Answer",
    "Choice",
    "EvalConfig",
    "ExactMatch",
    "GeneratedMatch",
    "HeldOut",
    "Measure",
    "Mmlu",
    "MmluData",
    "Perplexity",
    "Question",
    "Rule",
    "Scored",
    "Share",
    "Span",
    "Task",
    "TaskResult",
    "UnitLoss",
    "bootstrap_interval",
    "document_perplexity",
    "evaluate",
    "exact_match",
    "generated_match",
    "gsm8k_answer",
    "load_mmlu",
    "load_task",
    "log_likelihoods",
    "mmlu",
    "mmlu_prompt",
    "next_token_scores",
    "parse_eval_config",
    "perplexity",
    "viggo_representation",
    "wilson_interval",
]
