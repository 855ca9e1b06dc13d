"""Prompts in, texts out: tokens, batches of similar length, and strings in the order of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from lotaqaf_jax.errors import DataError
from lotaqaf_jax.generation.checks import integer
from lotaqaf_jax.generation.loop import generate
from lotaqaf_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["generate_text"]


def generate_text(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 256,
    batch_size: int = 16,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    add_special_tokens: bool = True,
    progress: str | None = "generating",
) -> list[str]:
    """Continue each prompt.

    Prompts of similar length share a batch, the longest first, so that a batch that does not fit into memory is the
    first one. What a prompt gets does not depend on the others, nor, when sampling, on their order.

    Args:
        model: a decoder, base, adapted or merged.
        tokenizer: the model's.
        prompts: texts, or token ids, which are taken as they are. A chat goes through the tokenizer's
            ``apply_chat_template(..., add_generation_prompt=True)`` first.
        max_new_tokens: tokens that each may get, or one number for every prompt.
        batch_size: prompts that are continued together, at most.
        eos_token_id: the token, or tokens, that end a text; None for the tokenizer's own.
        temperature: 0 for greedy; this and the next two as :func:`lotaqaf_jax.generation.generate`.
        top_k: see there.
        top_p: see there.
        seed: of the draws; each prompt has its own, by its place among the prompts.
        add_special_tokens: whether the tokenizer puts its BOS before a text. A chat template has written it already.
        progress: title of a progress bar, or None for none.

    Returns:
        For every prompt the text that follows it, special tokens left out.

    Raises:
        DataError: an empty prompt, or one that does not fit into the model's context with the new tokens.
        ConfigError: a setting out of range.
    """
    batch_size = integer("batch_size", batch_size, "a whole number from 1 on", 1)
    ids = [_tokens(tokenizer, prompt, i, add_special_tokens) for i, prompt in enumerate(prompts)]
    limits = np.broadcast_to(np.asarray(max_new_tokens), len(ids))
    stop = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    order = np.argsort([-len(prompt) for prompt in ids], kind="stable")
    texts = [""] * len(ids)
    with tqdm(total=len(ids), desc=progress, unit="text", leave=False, disable=progress is None) as bar:
        # Batches as equal as can be, rather than full ones and a rest: most have one size, which is compiled once.
        for rows in np.array_split(order, -(-len(ids) // batch_size)) if ids else []:
            lengths = [len(ids[i]) for i in rows]
            padded = np.zeros((len(rows), max(lengths)), np.int64)
            for place, i in enumerate(rows):
                padded[place, : lengths[place]] = ids[i]
            result = generate(
                model,
                padded,
                np.asarray(lengths),
                max_new_tokens=limits[rows].tolist(),
                eos_token_id=stop,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                rows=rows,
            )
            for i, tokens, length in zip(rows, result.tokens, result.lengths, strict=True):
                texts[i] = str(tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True))
            bar.update(len(rows))
    return texts


def _tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int], place: int, add_special_tokens: bool
) -> list[int]:
    ids = tokenizer(prompt, add_special_tokens=add_special_tokens).input_ids if isinstance(prompt, str) else prompt
    if not len(ids):
        raise DataError(f"prompt {place} is empty ({prompt!r}), expected at least one token.")
    return [int(token) for token in ids]
