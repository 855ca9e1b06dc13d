"""Text from a decoder: a cache of keys and values, greedy and sampled, many prompts at a time.

:mod:`~.loop` turns token ids into token ids, :mod:`~.text` prompts into texts, :mod:`~.sampling` logits into a token.
"""

from lotaqaf_jax.generation.loop import GenerationResult, generate
from lotaqaf_jax.generation.text import generate_text

__all__ = ["GenerationResult", "generate", "generate_text"]
