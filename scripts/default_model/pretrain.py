"""Pretraining of the dense model with AdamW, and exact match."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from default_model.tasks import Row
from lotaqaf_jax.data import Limits, TokenizedExamples, tokenize_examples
from lotaqaf_jax.data.formats import Chat, Message
from lotaqaf_jax.data.packing import Batch, collate, plan_rows
from lotaqaf_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["exact_match", "pretrain", "tokenize_rows"]

Batched = dict[str, jax.Array]


def tokenize_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], length: int) -> TokenizedExamples:
    """Rows as the data room would read them from a file in Alpaca columns."""
    chats = [
        Chat((Message("user", f"{row['instruction']}\n\n{row['input']}"), Message("assistant", row["output"])))
        for row in rows
    ]
    return tokenize_examples(tokenizer, chats, [str(i) for i in range(len(rows))], Limits(length), progress=False)


def _losses(model: Decoder, batch: Batched, prompt_weight: float) -> jax.Array:
    """Mean cross-entropy of the next token, (), prompts counted with ``prompt_weight``."""
    hidden = model.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
    logits = model.head(hidden)[:, :-1]
    follows = batch["segment_ids"][:, 1:]
    follows = (follows > 0) & (follows == batch["segment_ids"][:, :-1])
    weight = jnp.where(batch["labels"][:, 1:] >= 0, 1.0, prompt_weight) * follows
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
    return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def pretrain(
    model: Decoder,
    draw: Callable[[int], TokenizedExamples],
    *,
    steps: int,
    tokens: int,
    length: int,
    peak: float,
    pad_id: int,
    per_call: int = 20,
    prompt_weight: float = 0.1,
    report: Callable[[Decoder, int], str] | None = None,
    report_every: int = 500,
) -> Decoder:
    """Train every weight of a dense model.

    Args:
        model: the model.
        draw: gives so many new examples.
        steps: number of AdamW updates.
        tokens: tokens of a batch, about.
        length: tokens in a packed row.
        peak: largest learning rate; warm-up over 3 % of the steps, then a cosine down to 2 % of it.
        pad_id: id of padding.
        per_call: updates in one compiled call.
        prompt_weight: weight of the tokens that are not in the response.
        report: called every ``report_every`` steps with the model and the step; what it returns is printed.
        report_every: see ``report``.

    Returns:
        the trained model.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, int(0.03 * steps)), steps, 0.02 * peak)
    decay_mask = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05, mask=decay_mask)
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params: nnx.State, state: optax.OptState, batches: Batched) -> tuple:
        def step(carry: tuple, batch: Batched) -> tuple:
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: _losses(nnx.merge(graph, p, rest), batch, prompt_weight))(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(step, (params, state), batches)
        return params, state, losses.mean()

    rows = tokens // length
    stream = _batches(draw, rows, length, pad_id)
    bar = tqdm(total=steps, desc="pretraining", mininterval=10)
    begun = time.monotonic()
    for first in range(0, steps, per_call):
        batches = [next(stream) for _ in range(per_call)]
        stacked = {name: jnp.asarray(np.stack([batch[name] for batch in batches])) for name in batches[0]}
        params, state, loss = run(params, state, stacked)
        bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
        bar.update(per_call)
        done = first + per_call
        if report is not None and (done % report_every < per_call or done >= steps):
            text = report(nnx.merge(graph, params, rest), done)
            tqdm.write(f"step {done:5d}  loss {float(loss):.4f}  {time.monotonic() - begun:6.0f} s  {text}")
    bar.close()
    return nnx.merge(graph, params, rest)


def _batches(draw: Callable[[int], TokenizedExamples], rows: int, length: int, pad_id: int) -> Iterator[Batch]:
    """Endless packed batches of ``rows`` rows; examples are drawn and packed a pool at a time."""
    seed = 0
    while True:
        examples = draw(rows * 64)
        plan = list(plan_rows(examples.lengths, length, packing=True, seed=seed))
        # The last rows of a best-fit plan are the emptiest; shuffled, every batch gets its share of them.
        order = np.random.default_rng([seed, 3]).permutation(len(plan))
        for start in range(0, len(plan) - rows + 1, rows):
            chosen = [plan[i] for i in order[start : start + rows]]
            yield collate(chosen, examples, batch_size=rows, row_length=length, pad_id=pad_id)
        seed += 1


@functools.partial(jax.jit, static_argnums=0)
def _matches(graph: nnx.GraphDef, state: nnx.State, ids: jax.Array, labels: jax.Array) -> jax.Array:
    model = nnx.merge(graph, state)
    best = jnp.argmax(model.head(model.hidden_states(ids)), axis=-1)[:, :-1]
    return jnp.all((labels[:, 1:] < 0) | (best == labels[:, 1:]), axis=1)


def exact_match(model: Decoder, examples: TokenizedExamples, *, pad_id: int, batch_size: int = 64) -> np.ndarray:
    """Whether greedy generation gives every token of the response, its end token included; (examples,) bool.

    Greedy generation follows the reference up to the first token at which the reference is not the most likely one,
    so it equals the reference where, given the reference, every next token is the most likely one. No generation is
    needed.
    """
    length = -(-int(examples.lengths.max()) // 32) * 32
    split = nnx.split(model)
    found = []
    for start in range(0, len(examples), batch_size):
        rows = [[i] for i in range(start, min(start + batch_size, len(examples)))]
        batch: Batch = collate(rows, examples, batch_size=batch_size, row_length=length, pad_id=pad_id)
        found.append(np.asarray(_matches(*split, batch["input_ids"], batch["labels"]))[: len(rows)])
    return np.concatenate(found)
