"""Greedy generation against transformers' ``generate``, with random weights in float32."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.generation import generate
from lotaqaf_jax.models import load_pretrained
from tests.models.test_parity import MODELS, SIZES, build

torch = pytest.importorskip("torch")

LENGTHS = (11, 5, 1)


def test_writes_what_transformers_writes(tmp_path: Path) -> None:
    # Scaled frequencies, biases, a head_dim of its own and a tied head; forward passes are compared for more kinds.
    theirs = build(*MODELS["llama-scaled-biased-tied"])
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, dtype=jnp.float32, progress=False)
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 11))
    rows = [
        theirs.generate(
            torch.from_numpy(row[None, :length]), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
        )[0, length:].numpy()
        for row, length in zip(ids, LENGTHS, strict=True)
    ]
    # The sixth token of the first prompt ends a row, in ours and, cut by hand, in theirs.
    stop = int(rows[0][5])
    result = generate(ours, ids, LENGTHS, max_new_tokens=20, eos_token_id=stop, pad_token_id=95)
    assert len(np.unique(np.concatenate(rows))) > 10, "a model that repeats one token would prove little"
    for found, count, expected in zip(result.tokens, result.lengths, rows, strict=True):
        hits = np.flatnonzero(expected == stop)
        end = int(hits[0]) + 1 if len(hits) else 20
        assert count == end
        np.testing.assert_array_equal(found[:end], expected[:end])
