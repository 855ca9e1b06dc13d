"""The chunked loss is the plain one."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.data import IGNORE
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.training import loss as loss_module
from lotaqaf_jax.training.loss import score_tokens, summed_loss, targets_of


def batch_of(rng: np.random.Generator, rows: int = 3, length: int = 11) -> dict[str, jax.Array]:
    input_ids = rng.integers(4, 300, (rows, length))
    labels = np.where(rng.random((rows, length)) < 0.5, input_ids, IGNORE)
    labels[:, 0] = IGNORE
    positions = np.broadcast_to(np.arange(length), (rows, length))
    arrays = {"input_ids": input_ids, "labels": labels, "positions": positions, "segment_ids": np.ones((rows, length))}
    return {key: jnp.asarray(value, jnp.int32) for key, value in arrays.items()}


def test_targets_are_the_labels_one_to_the_left() -> None:
    assert targets_of(jnp.asarray([[IGNORE, 5, 6]])).tolist() == [[5, 6, IGNORE]]


@pytest.mark.parametrize("chunk_values", [2**24, 320 * 7, 320])
def test_loss_and_argmax_match_full_logits_in_float64(
    adapted: Decoder, monkeypatch: pytest.MonkeyPatch, chunk_values: int
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_VALUES", chunk_values)
    batch = batch_of(np.random.default_rng(0))
    logits = np.asarray(adapted(batch["input_ids"]), np.float64)[:, :-1]
    labels = np.asarray(batch["labels"])[:, 1:]
    counted = labels != IGNORE
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, np.where(counted, labels, 0)[..., None], -1)[..., 0]

    scores = score_tokens(adapted, **batch)

    np.testing.assert_allclose(scores.loss[:, :-1], np.where(counted, log_sum - picked, 0), atol=1e-4)
    np.testing.assert_array_equal(scores.counted[:, :-1], counted)
    np.testing.assert_array_equal(scores.correct[:, :-1], counted & (logits.argmax(-1) == labels))
    assert not scores.counted[:, -1].any()


def test_sum_is_over_targets_only(adapted: Decoder) -> None:
    batch = batch_of(np.random.default_rng(1))
    nothing = {**batch, "labels": jnp.full_like(batch["labels"], IGNORE)}
    assert float(summed_loss(adapted, nothing)) == 0
    assert float(summed_loss(adapted, batch)) > 0


def test_step_and_loss_get_along_without_what_reads_data() -> None:
    """Kernels are measured where neither Grain nor datasets nor a tokenizer is installed."""
    code = (
        "import sys, lotaqaf_jax.training.loss, lotaqaf_jax.training.step\n"
        "print(sorted({'grain', 'datasets', 'transformers', 'jinja2', 'orbax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
