"""A torch model, what our loader makes of its folder, and a tokenizer, for comparison with the outside."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from lotaqaf_jax.models import Decoder, load_pretrained

TOKENIZER = Path(__file__).parent.parent / "checkpoints" / "tokenizer"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in torch and here."""

    theirs: Any
    ours: Decoder
    tokenizer: Any
    folder: Path


def make_pair(folder: Path) -> Pair:
    """A random Llama of two unlike halves (grouped heads, biases, scaled rope) with a byte-level tokenizer of 320."""
    from transformers import AutoTokenizer

    from tests.models.test_parity import MODELS, build

    kind, changes = MODELS["llama-scaled-biased-tied"]
    theirs = build(kind, changes | {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2})
    theirs.save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    ours = load_pretrained(folder, dtype=jnp.float32, progress=False)
    return Pair(theirs, ours, AutoTokenizer.from_pretrained(folder), folder)


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pytest.importorskip("torch")
    return make_pair(tmp_path_factory.mktemp("pair"))


def torch_log_probs(model: Any, ids: list[int]) -> Any:
    """log softmax of the torch model's logits for one sequence, (length, vocab) in float64."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
