"""A small tokenizer of the kind that Llama 2 has, trained by the package ``tokenizers``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PREFIX = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
}
NO_PREFIX = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}
_TEXT = ["the cat and the hat", "then that thing ran", "  indented  twice", "hand in hand, and then at hand"] * 4


def metaspace(scheme: str) -> dict[str, Any]:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": step}


def sentencepiece_folder(folder: Path, model: dict[str, Any] | None = None, **parts: Any) -> Path:
    """tokenizer.json and its config: special tokens, a token for every byte, what is trained, and an added token.

    Args:
        folder: to write.
        model: changes of its BPE.
        parts: of tokenizer.json, in place of spaces by ``PREFIX`` and BOS before every text.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    trained.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    said = json.loads(trained.to_str())["model"]
    tokens = [*SPECIAL, *BYTES, *sorted(said["vocab"], key=said["vocab"].__getitem__)]
    bpe = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": said["merges"]}
    bpe["vocab"] = {token: i for i, token in enumerate(tokens)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": token, "special": True} | flags for i, token in enumerate(SPECIAL)]
    added.append({"id": len(tokens), "content": "<tool>", "special": False} | flags)
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    bos: dict[str, Any] = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    ids = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text], "special_tokens": ids}
    file = {"version": "1.0", "added_tokens": added, "post_processor": template, **PREFIX, **parts}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(file | {"model": bpe | (model or {})}))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
