"""GGUF files that we write, read by transformers: the model's logits, and the tokenizer's tokens.

A tokenizer of SentencePiece's kind is read by the package sentencepiece too, which has the algorithm of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import convert
import lotaqaf_jax
from lotaqaf_jax.models import Decoder, QuantSpec, merge
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import checkpoint
from tests.convert.targets.gguf_making import LLAMA3, changed_tokenizer, config, module_weights, split
from tests.convert.targets.sentencepiece_making import sentencepiece_folder
from tests.interop.conftest import run_python
from tests.interop.training import text, train_ternary
from tests.models.tiny import quantized_decoder
from tests.peer import torch_model

CLIENT = Path(__file__).parent / "gguf_client.py"
PLAIN_TEXTS = ["the hand in that hat", "  then  a thing\n\tand  ", "äöü 漢字 🙂", " ", "thththth"]
TEXTS = ["Hello, it's 1234567 apples!", "  two  spaces\n\nand lines\r\n ", "äöü 漢字 <s></s>"]

# Largest difference of logits per unit of their mean size: from a model of the same weights, both in float32, and from
# ours, whose weights are up to 0.008 of a step away; and llama.cpp's, which rounds the inputs of a product to 8 bit.
SAME, OURS, LLAMA = 3e-5, 0.02, 0.25

SCALED = LLAMA3 | {"original_max_position_embeddings": 32}  # so that 24 tokens show it


@dataclasses.dataclass(frozen=True)
class Case:
    """A base with random adapters merged. ``made`` is its config, where it is random too, and no checkpoint's.

    ``with_config``: transformers gets config.json, since it does not read this model's from the file.
    ``sentencepiece``: its tokenizer is of that kind.
    """

    name: str
    bits: int = 4
    made: dict[str, Any] | None = None
    tokenizer: bool = True
    with_config: bool = False
    sentencepiece: bool = False


# Every width of both, tied and not in turn.
RANDOM = [
    Case(
        f"{model_type}-b{bits}-{'tied' if tied else 'untied'}",
        bits,
        {"model_type": model_type, "tie_word_embeddings": tied},
    )
    for model_type, bits, tied in (
        ("llama", 2, True),
        ("llama", 3, False),
        ("llama", 4, True),
        ("qwen2", 2, False),
        ("qwen2", 3, True),
        ("qwen2", 4, False),
    )
]
CASES = (
    *RANDOM,
    Case("llama-heads-of-32", made={"model_type": "llama", "head_dim": 32}),
    # transformers reads neither rope_freqs.weight nor, in Llama, biases.
    Case(
        "llama3-rope",
        made={"model_type": "llama", "rope_parameters": {"rope_theta": 100.0} | SCALED, "head_dim": 32},
        with_config=True,
    ),
    Case("llama-biases", made={"model_type": "llama", "attention_bias": True, "mlp_bias": True}, with_config=True),
    Case("llama-sentencepiece", made={"model_type": "llama"}, sentencepiece=True),
    Case("ckpt-llamapos-b4g32-asym"),
    Case("ckpt-llamapos-b3g32-asym"),
    Case("babyllama105-gptq-w2g32-asym", tokenizer=False),
    Case("base14m-qwen2-gptq-w4g64-asym"),
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """Logits by transformers from the file, by torch from the file's weights, by us, and by us without the adapters;
    tokens by transformers and by the package sentencepiece; both by llama.cpp, where it is installed."""

    theirs: np.ndarray
    same: np.ndarray
    ours: np.ndarray
    base: np.ndarray
    tokens: list[list[int]]
    pieces: list[list[int]]
    llama: tuple[np.ndarray, list[list[int]]] | None
    expected_tokens: list[list[int]]


def models(case: Case, folder: Path) -> tuple[Decoder, Decoder, dict[str, Any]] | None:
    """The base, the base with adapters merged, and where the exported files come from besides."""
    if case.made is not None:
        made, quant = config(**case.made), QuantSpec(case.bits, 32)
        if case.sentencepiece:
            sentencepiece_folder(folder)
        else:
            digits = r"\p{N}{1,3}" if made.model_type == "llama" else r"\p{N}"
            changed_tokenizer(folder, pre_tokenizer=split(digits))
        base = quantized_decoder(made, quant)
        return base, merge(train_ternary(base, text(folder))), {"tokenizer_from": folder}
    source = checkpoint(case.name)
    if source is None:
        return None
    tokenizer = checkpoint("tokenizer")
    assert tokenizer is not None
    shutil.copytree(source, folder)
    if case.tokenizer and not (folder / "tokenizer.json").is_file():
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    ids = text(folder)
    if not case.tokenizer:
        (folder / "tokenizer.json").unlink()
    plain, base = lotaqaf_jax.load_pretrained(folder, progress=False), CheckpointFolder(folder)
    return plain, merge(train_ternary(plain, ids)), {"base": base}


def logits_of_the_file(folder: Path, model: Decoder, ids: np.ndarray) -> np.ndarray:
    """By the model of torch, the file's weights in place of ours."""
    found = torch_model(model)
    for name, weight in module_weights(folder, model).items():
        found.get_submodule(name).weight.data.copy_(torch.from_numpy(weight))
    with torch.no_grad():
        return found(input_ids=torch.from_numpy(ids).long()).logits.numpy()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, client_python: str) -> dict[str, Opened]:
    root = tmp_path_factory.mktemp("gguf")
    jobs: list[dict[str, Any]] = []
    here = {}
    for case in CASES:
        made = models(case, root / f"{case.name}.base")
        if made is None:
            continue
        base, model, options = made
        folder = root / case.name
        convert.save_pretrained(model, folder, target="gguf", allow_lossy=True, progress=False, **options)
        ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)
        np.save(root / f"{case.name}.ids.npy", ids)
        texts = TEXTS + PLAIN_TEXTS if case.tokenizer else []
        jobs.append(
            {"folder": str(folder), "config": case.with_config, "input_ids": str(root / f"{case.name}.ids.npy")}
        )
        jobs[-1] |= {"texts": texts, "plain_texts": PLAIN_TEXTS if case.sentencepiece else []}
        jobs[-1] |= {"output": str(root / f"{case.name}.npz")}
        tokens = []
        if texts:
            tokenizer = AutoTokenizer.from_pretrained(root / f"{case.name}.base")
            tokens = [tokenizer.encode(text) for text in texts]
        logits = [np.asarray(m(ids), np.float32) for m in (model, base)]
        here[case.name] = (logits_of_the_file(folder, model, ids), *logits, tokens)
    (root / "jobs.json").write_text(json.dumps(jobs))
    run_python(client_python, CLIENT, root / "jobs.json", cwd=root)
    found = {}
    for name, (same, ours, base_logits, tokens) in here.items():
        theirs = np.load(root / f"{name}.npz")
        read, pieces = (json.loads(str(theirs[key])) for key in ("tokens", "pieces"))
        llama = None
        if "llama_logits" in theirs:
            llama = theirs["llama_logits"], json.loads(str(theirs["llama_tokens"]))
        found[name] = Opened(theirs["logits"], same, ours, base_logits, read, pieces, llama, tokens)
    return found


def distance(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.max(np.abs(one - two)) / np.mean(np.abs(two)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_computes_the_model_in_the_file(opened: dict[str, Opened], case: Case) -> None:
    if case.name not in opened:
        pytest.skip("the base is in the shared folder, which is absent")
    found = opened[case.name]
    same, ours, moved = (distance(found.theirs, other) for other in (found.same, found.ours, found.base))
    print(f"{case.name}: same weights {same:.1e}, ours {ours:.1e}, base {moved:.1e}")
    assert same <= SAME
    assert ours <= OURS
    # The check can see an adapter that was not merged, or left without its offset.
    assert moved > 4 * ours


@pytest.mark.parametrize("case", [case for case in CASES if case.tokenizer], ids=lambda case: case.name)
def test_transformers_reads_the_tokenizer_in_the_file(opened: dict[str, Opened], case: Case) -> None:
    if case.name not in opened:
        pytest.skip("the base is in the shared folder, which is absent")
    assert opened[case.name].tokens == opened[case.name].expected_tokens


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_llama_cpp_computes_the_model_and_its_tokens(opened: dict[str, Opened], case: Case) -> None:
    if case.name not in opened:
        pytest.skip("the base is in the shared folder, which is absent")
    found = opened[case.name]
    if found.llama is None:
        pytest.skip("the client has no llama.cpp; `pip install llama-cpp-python` there compiles it")
    logits, tokens = found.llama
    same, moved = distance(logits, found.same), distance(logits, found.base)
    print(f"{case.name}: same weights {same:.1e}, base {moved:.1e}")
    assert same <= LLAMA
    assert moved > 4 * same
    assert tokens == found.expected_tokens


def test_sentencepiece_makes_the_same_tokens_of_the_scores_in_the_file(opened: dict[str, Opened]) -> None:
    found = opened["llama-sentencepiece"]
    wanted = found.expected_tokens[len(TEXTS) :]
    assert found.pieces == [tokens[1:] for tokens in wanted]  # without BOS
    assert max(map(len, found.pieces)) < 25, "no merges in it"
