"""Seconds to merge the adapters of every projection of a model into its packed words.

    python benchmarks/merge.py [--model qwen2.5-14b]

``bytes`` is what reading and writing the packed words once takes at the bandwidth of a device copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from common import COPY, environment, layer_arguments, seconds_of, write_json
from flax import nnx
from models import random_decoder

from lotaqaf_jax.models import Adapter, QuantSpec, add_adapters, linears, merge
from lotaqaf_jax.models.presets import preset


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-14b")
    layer_arguments(parser)
    options = parser.parse_args()
    print(environment())
    quant = QuantSpec(options.bits, options.group_size)
    model = add_adapters(random_decoder(preset(options.model), quant, stored=jnp.bfloat16), options.rank, options.omega)
    # Fresh adapters have B = 0 and would move nothing.
    for i, (_, linear) in enumerate(linears(model)):
        adapter = linear.adapters
        b = jax.random.randint(jax.random.key(i), adapter.b.shape, -1, 2, jnp.int8)
        linear.adapter = Adapter(dataclasses.replace(adapter, b=b))

    def run() -> None:
        jax.block_until_ready(nnx.state(merge(model)))

    words = sum(linear.packed.qweight.nbytes for _, linear in linears(model))
    line = {"merge_s": seconds_of(run, repeats=5), "bytes_s": 2 * words / COPY}
    print(", ".join(f"{key} {value:.4f}" for key, value in line.items()))
    write_json(options, {**line})


if __name__ == "__main__":
    main()
