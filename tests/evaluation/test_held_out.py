"""Exact match by one forward pass is exact match by greedy generation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.evaluation import evaluate
from lotaqaf_jax.models import Decoder, DecoderConfig, init_decoder

CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return init_decoder(CONFIG, jax.random.key(0), scale=0.4)


def generate(model: Decoder, prompt: list[int], count: int, length: int) -> list[int]:
    """Greedy generation the slow way: one whole forward pass a token, in rows of one length."""
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (length - len(ids))])
        ids.append(int(np.argmax(model(padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def batch_of(prompts: list[list[int]], responses: list[list[int]], length: int) -> dict[str, np.ndarray]:
    rows = len(prompts)
    batch = {key: np.zeros((rows, length), np.int32) for key in ("input_ids", "labels", "positions", "segment_ids")}
    batch["labels"] -= 100
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = prompt + response
        batch["input_ids"][i, : len(whole)] = whole
        batch["labels"][i, len(prompt) : len(whole)] = response
        batch["positions"][i, : len(whole)] = np.arange(len(whole))
        batch["segment_ids"][i, : len(whole)] = 1
    return batch


def test_equals_greedy_generation(model: Decoder) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 23, 4).tolist() for _ in range(8)]
    responses = [generate(model, prompt, 5, 12) for prompt in prompts]
    for i in (1, 4, 6):  # Three responses that are not what the model would write.
        place = int(rng.integers(5))
        responses[i][place] = (responses[i][place] + 1) % 23
    result = evaluate(model, [batch_of(prompts, responses, 12)])
    assert result.exact_match == 5 / 8
    assert (result.rows, result.tokens) == (8, 40)


def test_rows_that_fill_up_a_batch_do_not_count(model: Decoder) -> None:
    whole = batch_of([[1, 2], [3, 4]], [[5], [6]], 6)
    filled = {key: np.concatenate([value, np.zeros_like(value)]) for key, value in whole.items()}
    filled["labels"][2:] = -100
    assert evaluate(model, [filled]) == pytest.approx(evaluate(model, [whole]))


def test_no_target_at_all_is_refused(model: Decoder) -> None:
    batch = batch_of([[1, 2]], [[5]], 6)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no held-out row"):
        evaluate(model, [batch])
