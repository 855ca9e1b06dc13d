"""Make the model, tokenizer and data that ``python train.py`` uses when it is given no arguments.

    python scripts/make_default_model.py --output lotaqaf_jax/assets/default

A Qwen2 decoder of 0.9 million parameters is pretrained on messages to a toy order desk and the notations that twenty
departments keep them in (scripts/default_model/orders.py), then quantised with GPTQ. The data that goes with it asks
for the notation of a twenty-first department. Everything is synthetic, made from the word lists of that file and
``--seed``.

With the defaults it took 10 minutes on two cores, jax 0.10.2. The model then answers
97.4 % of 384 unseen pretraining rows exactly, before and after quantisation; of the rows that ask for a
department's notation all, and of the new notation none. Everything is drawn from ``--seed``: the data is the same
everywhere, the weights depend on the machine and the version of JAX too. 1.14 MB in all.

LoTA-QAF of rank 32, omega 8 (a quarter of the rank), offset "reference", schedule "reference", no averaging, batch 16
and 60 steps takes the new notation from 0 % to 99-100 % exact match on the held-out rows (seeds 0, 1, 2), the loss from
0.7 to below 0.005, moves 2.2-2.4 % of the integers and keeps 96-97 % on the pretraining tasks. At the published
omega = 0.75 * rank (rank 64, omega 48) nothing moves in 60 steps, and exact match stays 0 %.

    output/model/   config.json, model.safetensors (GPTQ), tokenizer.json, tokenizer_config.json, chat_template.jinja,
                    generation_config.json
    output/data/    train.jsonl, heldout.jsonl: instruction, input, output
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

import convert
from convert.quantize import LOG
from default_model.pretrain import exact_match, pretrain, tokenize_rows
from default_model.tasks import Row, draw_data, draw_pretraining_row, tokenizer_corpus
from default_model.tokenizer import END, PAD, build_tokenizer
from lotaqaf_jax.models import Decoder, DecoderConfig, dense_spec, init_decoder, load_pretrained

LENGTH = 192  # tokens in a packed row of pretraining
VOCABULARY = 768
INITIAL_SCALE = 0.05
CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
)


def main() -> None:
    """Parse, pretrain, quantise, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("lotaqaf_jax/assets/default"), help="folder to write")
    parser.add_argument(
        "--work", type=Path, help="keep the 32-bit weights here; weights found here are not trained again"
    )
    parser.add_argument("--steps", type=int, default=1400, help="pretraining steps")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens of a pretraining batch")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--bits", type=int, default=4, help="width of the quantised weights")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--train-rows", type=int, default=2048)
    parser.add_argument("--heldout-rows", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.monotonic()
    staging = args.output.with_name(args.output.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)

    heldout, train = write_data(staging / "data", args.heldout_rows, args.train_rows, args.seed)
    tokenizer = build_tokenizer(tokenizer_corpus(random.Random(args.seed)), VOCABULARY, staging / "tokenizer")
    check = Check(tokenizer, heldout, args.seed)
    dense = load_or_pretrain(args, tokenizer, check)
    print(f"dense       {check(dense)}")

    write_dense(staging / "dense", dense, tokenizer, staging / "tokenizer")
    samples = calibration(tokenizer, args.seed)
    # gptq_v2, as it was shipped first.
    sizes = {"bits": args.bits, "group_size": args.group_size, "checkpoint_format": "gptq_v2"}
    print(convert.quantize(staging / "dense", staging / "model", calibration=samples, **sizes))
    print(f"quantised   {check(load_pretrained(staging / 'model'))}")
    (staging / "model" / LOG).unlink()
    for folder in ("tokenizer", "dense"):
        shutil.rmtree(staging / folder)

    shutil.rmtree(args.output, ignore_errors=True)
    staging.rename(args.output)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"wrote {args.output}: {size:,} bytes, {len(train)} + {len(heldout)} rows, {time.monotonic() - begun:.0f} s")


def write_data(folder: Path, heldout_rows: int, train_rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Write heldout.jsonl and train.jsonl, rows of the new task without a common message, and return both."""
    heldout, train = draw_data(heldout_rows, train_rows, seed)
    folder.mkdir(parents=True)
    for name, rows in (("heldout", heldout), ("train", train)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return heldout, train


class Check:
    """Exact match on unseen pretraining rows, by kind of task, and on the new task."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, heldout: list[Row], seed: int) -> None:
        rng = random.Random(f"check {seed}")
        self.rows = [draw_pretraining_row(rng) for _ in range(384)]
        self.known = tokenize_rows(tokenizer, self.rows, LENGTH)
        self.new = tokenize_rows(tokenizer, heldout, LENGTH)
        self.pad_id: int = tokenizer.pad_token_id

    def __call__(self, model: Decoder) -> str:
        known = exact_match(model, self.known, pad_id=self.pad_id)
        kinds: dict[str, list[bool]] = {}
        for row, right in zip(self.rows, known, strict=True):
            kinds.setdefault(" ".join(row["instruction"].split()[:2]), []).append(bool(right))
        shares = ", ".join(f"{kind} {np.mean(rights):.2f}" for kind, rights in sorted(kinds.items()))
        new = exact_match(model, self.new, pad_id=self.pad_id).mean()
        return f"exact match {known.mean():.3f} on known tasks ({shares}), {new:.3f} on the new one"


def load_or_pretrain(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, check: Check) -> Decoder:
    """The dense model: read from ``--work`` if it is there, else pretrained."""
    model = init_decoder(CONFIG, jax.random.key(args.seed), scale=INITIAL_SCALE)
    saved = args.work / "dense.npz" if args.work else None
    if saved is not None and saved.is_file():
        print(f"dense weights read from {saved}; delete the file to train them again")
        leaves, tree = jax.tree.flatten(nnx.state(model, nnx.Param))
        with np.load(saved) as arrays:
            nnx.update(model, jax.tree.unflatten(tree, [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]))
        return model

    def save(model: Decoder) -> None:
        if saved is not None:
            saved.parent.mkdir(parents=True, exist_ok=True)
            leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
            np.savez(saved.with_name("part.npz"), **{str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)})

    def report(model: Decoder, step: int) -> str:
        save(model)
        return check(model)

    rng = random.Random(f"pretraining {args.seed}")
    model = pretrain(
        model,
        lambda count: tokenize_rows(tokenizer, [draw_pretraining_row(rng) for _ in range(count)], LENGTH),
        steps=args.steps,
        tokens=args.tokens,
        length=LENGTH,
        peak=args.learning_rate,
        pad_id=check.pad_id,
        report=report,
        report_every=200,
    )
    save(model)
    if saved is not None:
        saved.with_name("part.npz").rename(saved)
    return model


def calibration(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[np.ndarray]:
    """Token ids of pretraining rows, for the Hessians of GPTQ."""
    rng = random.Random(f"calibration {seed}")
    examples = tokenize_rows(tokenizer, [draw_pretraining_row(rng) for _ in range(768)], LENGTH)
    return [example.input_ids for example in examples]


def write_dense(folder: Path, model: Decoder, tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path) -> None:
    """Write the model in float16, with its configs and the tokenizer's files."""
    stop, pad = (int(tokenizer.convert_tokens_to_ids(token)) for token in (END, PAD))
    generation = {"do_sample": False, "eos_token_id": stop, "max_new_tokens": 96, "pad_token_id": pad}
    (tokenizer_folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    half = Decoder(CONFIG, dense_spec(CONFIG, jnp.float16))
    nnx.update(half, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), nnx.state(model, nnx.Param)))
    config = {"bos_token_id": None, "eos_token_id": stop, "pad_token_id": pad}
    convert.write_checkpoint(half, folder, config=config, tokenizer_from=tokenizer_folder)


if __name__ == "__main__":
    main()
