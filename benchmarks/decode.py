"""Tokens per second of greedy generation, on random weights of a real model's shapes, packed and in bfloat16.

    python benchmarks/decode.py [--model qwen2.5-14b] [--batch 1 64] [--dense]

The time of a decoding step is the difference between two runs of different lengths over the difference in tokens, so
that the prompt and the launch are not in it. What was written is compared with the forward pass that trains, which uses
none of the kernels of decoding. ``bytes`` is the rate at which the weights could be read once a token at
the bandwidth of a device copy (4.3e12 bytes/s on an H200).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from agreement import generation_gap
from common import COPY, environment, print_kernels, print_line, seconds_of, write_json
from flax import nnx
from models import random_decoder

from lotaqaf_jax.generation import generate
from lotaqaf_jax.models import Decoder, QuantSpec
from lotaqaf_jax.models.presets import preset

PROMPT = 32
GAP = 0.5
"""Standard deviations of the logits by which a token may miss the greatest: ties, left open by rounding."""
CHECKED = 4
"""Rows that are compared."""


def measure(model: Decoder, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a decoding step and tokens per second."""
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, PROMPT), dtype=np.int32)
    lengths = np.full(batch, PROMPT, np.int32)

    def run(tokens: int) -> Any:
        return generate(model, prompt, lengths, max_new_tokens=tokens)

    few, many = options.tokens
    written = np.asarray(run(few).tokens)[:CHECKED]
    missed, gap = generation_gap(model, prompt[:CHECKED], written)
    if gap > GAP:
        sys.exit(f"batch {batch}: a token's logit is {gap:.2f} deviations below the greatest of the forward pass.")
    short, long = (seconds_of(lambda n=n: run(n), repeats=3) for n in (few, many))
    step = (long - short) / (many - few)
    # Every weight but the embedding is read for a token.
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) - model.embed_tokens.weight.get_value().nbytes
    line = {"batch": batch, "step_ms": 1e3 * step, "tokens_per_s": batch / step, "bytes": batch * COPY / read}
    line |= {"other_tokens": missed, "gap": gap}
    return line | ({"profile": print_kernels(lambda: run(few))} if options.profile else {})


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-14b")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", nargs=2, type=int, default=[64, 192], help="lengths of the two runs")
    parser.add_argument("--profile", action="store_true", help="also the device's time by kernel, of the short run")
    parser.add_argument("--dense", action="store_true", help="also the same model in bfloat16")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    print(environment())
    lines = []
    quants = [QuantSpec(options.bits, options.group_size), *([None] if options.dense else [])]
    for quant in quants:
        model = random_decoder(preset(options.model), quant, stored=jnp.bfloat16)
        for batch in options.batch:
            line = {"weights": f"{quant.bits} bit" if quant else "bfloat16", **measure(model, batch, options)}
            lines.append(line)
            print_line(line)
        del model
    write_json(options, {"lines": lines})


if __name__ == "__main__":
    main()
