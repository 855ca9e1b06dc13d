"""Target gguf: a tokenizer of SentencePiece's kind encodes alike from the file, or is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models
from transformers import AutoTokenizer

import convert
from convert.targets.gguf_metadata import read_tokenizer
from convert.targets.gguf_sentencepiece import misfits, scores
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import QuantSpec
from tests.convert.targets.gguf_making import config, read
from tests.convert.targets.sentencepiece_making import (
    BYTES,
    NO_PREFIX,
    PREFIX,
    SPECIAL,
    metaspace,
    sentencepiece_folder,
)
from tests.models.tiny import quantized_decoder

TEXTS = ["the hand", "then  that hat\n\tthing", "äöü 漢字 🙂", "no thing</s> and <tool>that", "▁x", "", "z" * 9]


def save(folder: Path, source: Path) -> dict[str, Any]:
    """The fields of the file of a model with the tokenizer of ``source``."""
    options = {"tokenizer_from": source, "allow_lossy": True, "progress": False}
    convert.save_pretrained(quantized_decoder(config(), QuantSpec(2, 32)), folder, target="gguf", **options)
    return {name: field.contents() for name, field in read(folder).fields.items()}


def test_the_file_has_tokens_with_scores(tmp_path: Path) -> None:
    source = sentencepiece_folder(tmp_path / "source")
    found = save(tmp_path / "out", source)
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    trained = list(model["vocab"])[259:]
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.pre"] == "default"
    padding = [f"[PAD{i}]" for i in range(len(model["vocab"]) + 1, 330)]
    assert found["tokenizer.ggml.tokens"] == [*SPECIAL, *BYTES, *trained, "<tool>", *padding]
    kind = gguf.TokenType
    types = [kind.UNKNOWN] + [kind.CONTROL] * 2 + [kind.BYTE] * 256 + [kind.NORMAL] * len(trained)
    assert found["tokenizer.ggml.token_type"] == [*types, kind.USER_DEFINED, *[kind.UNUSED] * len(padding)]
    # Trained one after the other, each token by one merge.
    places = {left + right: i for i, (left, right) in enumerate(model["merges"])}
    assert len(places) == len(model["merges"]) > 20
    wanted = [-float(places.get(token, len(places))) for token in trained]
    assert found["tokenizer.ggml.scores"] == [0.0] * 259 + wanted + [0.0] * (1 + len(padding))
    ids = {"bos": 1, "eos": 2, "unknown": 0}
    assert {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ids} == ids
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert "tokenizer.ggml.merges" not in found


@pytest.mark.parametrize("parts", [PREFIX, metaspace("first")], ids=["prepend", "metaspace"])
@pytest.mark.filterwarnings("ignore:.*Metaspace.*:UserWarning")
def test_transformers_encodes_by_the_file_as_by_the_tokenizer(parts: dict[str, Any], tmp_path: Path) -> None:
    source = sentencepiece_folder(tmp_path / "source", **parts)
    save(tmp_path / "out", source)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    wanted = AutoTokenizer.from_pretrained(source)
    assert [ours.encode(text) for text in TEXTS] == [wanted.encode(text) for text in TEXTS]
    assert len(wanted.encode("the hand")) < 6, "no merges in it"


def by_scores(text: str, vocab: Mapping[str, int], score: Mapping[str, float]) -> list[str]:
    """llama.cpp's rule: of all neighbours that make a token, the highest score, and the leftmost of them."""
    parts = list(text)
    while True:
        pairs = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in vocab]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@st.composite
def merges(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Any merges of two letters, in any order in which parts come before wholes or after them."""
    tokens, found = ["a", "b"], []
    for _ in range(draw(st.integers(1, 7))):
        pair = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if pair not in found:
            found.append(pair)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    return draw(st.permutations(found))


@settings(max_examples=150, deadline=None)
@given(merges())
def test_held_exactly_where_every_text_is_encoded_alike(pairs: list[tuple[str, str]]) -> None:
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["a", "b", *("".join(pair) for pair in pairs)]))}
    assume(max(map(len, vocab)) <= 9)
    model = {"vocab": vocab | {byte: 100 + i for i, byte in enumerate(BYTES)}, "merges": pairs, "byte_fallback": True}
    refused = list(misfits(model, [NO_PREFIX["normalizer"]], [], added=()))
    bpe, score = models.BPE(vocab=vocab, merges=pairs), scores(model)
    texts = ["".join(letters) for n in range(1, 10) for letters in itertools.product("ab", repeat=n)]
    alike = all(by_scores(text, vocab, score) == [part.value for part in bpe.tokenize(text)] for text in texts)
    assert alike == (not refused)


@pytest.mark.parametrize(
    ("parts", "prefix", "warned"),
    [
        (PREFIX, True, False),
        (NO_PREFIX, False, False),
        (metaspace("first"), True, True),
        (metaspace("always"), True, True),
        (metaspace("never"), False, False),
    ],
)
def test_the_space_before_the_text(
    parts: dict[str, Any], prefix: bool, warned: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    found = read_tokenizer(sentencepiece_folder(tmp_path / "source", **parts), 330)
    assert found is not None
    assert found.space_prefix is prefix
    assert any("(Metaspace)" in str(w.message) for w in recwarn) is warned


def without_one_merge(folder: Path) -> dict[str, Any]:
    """The last token is made by no merge any more."""
    model = json.loads((sentencepiece_folder(folder) / "tokenizer.json").read_text())["model"]
    return {"merges": model["merges"][:-1]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"byte_fallback": False}}, "byte_fallback"),
        ({"model": {"vocab": {token: i for i, token in enumerate([*SPECIAL, *BYTES[1:]])}}}, "byte_fallback"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"normalizer": None}, "nothing"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Prepend, Replace, Whitespace"),
        (metaspace("never") | {"pre_tokenizer": metaspace("never")["pre_tokenizer"] | {"split": True}}, "Metaspace"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "source", **changes)
    with pytest.raises(ConfigError, match=f"tokenizer.json.*{said}.*copy of the folder"):
        read_tokenizer(folder, 330)


def test_a_token_that_only_llama_cpp_makes_is_refused(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "source", model=without_one_merge(tmp_path / "whole"))
    last = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())["model"]["merges"][-1]
    with pytest.raises(ConfigError, match=f"never makes the token '{''.join(last)}'"):
        read_tokenizer(folder, 330)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert "".join(last) not in tokenizer.encode("".join(last)).tokens


def test_special_tokens_may_be_made_of_tokens(tmp_path: Path) -> None:
    """ "<s>" is cut out of a text before it could be made of "<s" and ">"."""
    source = sentencepiece_folder(tmp_path / "source")
    said = json.loads((source / "tokenizer.json").read_text())
    for token in ("<", "s>"):
        said["model"]["vocab"][token] = len(said["model"]["vocab"]) + 1
    said["model"]["merges"].append(["s", ">"])
    said["model"]["vocab"][">"] = len(said["model"]["vocab"]) + 1
    (source / "tokenizer.json").write_text(json.dumps(said))
    assert read_tokenizer(source, 340) is not None
