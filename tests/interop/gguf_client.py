"""Opens GGUF files with transformers, and with llama.cpp where it is installed (the package llama-cpp-python), and
writes logits and tokens. Has its own environment, without us.

    python gguf_client.py jobs.json

A job: {"folder", "config" (take config.json beside the file, not what the file says), "input_ids" (.npy), "texts",
"plain_texts", "output" (.npz)}. ``texts`` are encoded with the tokenizer in the file, where it has one; ``plain_texts``
by the package sentencepiece, with the tokens, types and scores of the file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def by_sentencepiece(folder: str, texts: list[str]) -> list[list[int]]:
    import sentencepiece
    from gguf import GGUFReader
    from sentencepiece import sentencepiece_model_pb2

    said = {name: field.contents() for name, field in GGUFReader(f"{folder}/model.gguf").fields.items()}
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = said["tokenizer.ggml.add_space_prefix"]
    model.normalizer_spec.remove_extra_whitespaces = False
    of_tokens = (said[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*of_tokens, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)  # The numbers of the types are the same.
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return [processor.encode(text) for text in texts]


def by_llama_cpp(job: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import Llama

    ids = np.load(job["input_ids"])
    model = Llama(f"{job['folder']}/model.gguf", n_ctx=ids.shape[1], logits_all=True, n_threads=1, verbose=False)
    logits = []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        logits.append(model.scores[: len(row)].copy())
    tokens = [model.tokenize(text.encode(), special=True) for text in job["texts"]]
    return {"llama_logits": np.stack(logits), "llama_tokens": json.dumps(tokens)}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        given = {"config": AutoConfig.from_pretrained(job["folder"])} if job["config"] else {}
        model = AutoModelForCausalLM.from_pretrained(
            job["folder"], gguf_file="model.gguf", dtype=torch.float32, **given
        ).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(np.load(job["input_ids"])).long()).logits
        tokens = []
        if job["texts"]:
            tokenizer = AutoTokenizer.from_pretrained(job["folder"], gguf_file="model.gguf")
            tokens = [tokenizer.encode(text) for text in job["texts"]]
        pieces = by_sentencepiece(job["folder"], job["plain_texts"]) if job["plain_texts"] else []
        found = {"logits": logits.numpy(), "tokens": json.dumps(tokens), "pieces": json.dumps(pieces)}
        if importlib.util.find_spec("llama_cpp"):
            found |= by_llama_cpp(job)
        np.savez(job["output"], **found)


if __name__ == "__main__":
    main()
