"""The training kernels against plain JAX, on one layer of real shapes: microseconds of the device for a call.

    python benchmarks/kernels.py [--bits 4 2 3 8] [--shapes 5120x13824 ...] [--only gradient ...] [--json kernels.json]

Columns xla (plain JAX) and triton (our kernels):

* adjusted: adapters to the adjusted bfloat16 weight; merge: to merged words and mu; dequantize: merged words and mu to
  bfloat16;
* gradient: the gradients of the adapters from that of the weight, bfloat16; float8: the gradient of the weight from
  8192 rows of x and dy, rounded to float8 by kernels, against the product x.T @ dy in bfloat16.

Columns sort and quantile, both in plain JAX:

* threshold: the exact quantile of every layer of the A of 48 layers, against a sort;
* optimizer: the t-SignSGD update of all adapters of Qwen2.5-14B, against the same with a sort.

``bytes`` is what reading the inputs and writing the results once takes at the bandwidth of a device copy. What does not
depend on the width is measured once a shape, the optimizer once.

The two columns are first compared: bit for bit, gradient and float8 by relative error; a line that differs by more is
marked, and the exit status is 1. One compiled program makes all calls, each on random inputs of its own (XLA computes
equal calls once), together more than the L2 cache holds, and returns their whole results, so that it does nothing else.
Its time is that of all that runs on the device, by JAX's profiler: the median of three runs after a first, over the
number of calls. Launches and gaps between kernels are not in it. Needs an NVIDIA card, and Triton and jax-triton.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from common import COPY, device_seconds, environment, layer_arguments, relative_error, shape_of, write_json
from operations import LAYERS, TOKENS, Line, float8, of_words, optimizer, threshold

OF_WORDS = ("adjusted", "merge", "dequantize")
EVERY = (*OF_WORDS, "gradient", "float8", "threshold", "optimizer")


def measure(line: Line) -> dict[str, Any]:
    """Compare the columns, and time them: microseconds a call."""
    truth, found = (line.whole(jax.device_get(jax.jit(call)(*line.inputs[0]))) for call in line.columns.values())
    error = relative_error(found, truth)
    times = {column: microseconds(call, line.inputs) for column, call in line.columns.items()}
    bound = line.bytes / COPY * 1e6
    return {"call": line.name, **times, "bytes": bound, "error": error, "agrees": error <= line.tolerance}


def microseconds(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
    """Of the device, for one of the calls that a program makes."""
    run = jax.jit(lambda inputs: [call(*one) for one in inputs])
    return device_seconds(lambda: jax.block_until_ready(run(inputs))) / len(inputs) * 1e6


def lines_of(options: argparse.Namespace) -> Iterator[tuple[str, Line]]:
    """All that was asked for, with the name of its layer; inputs are made when they are reached."""
    wanted = options.only
    for shape in options.shapes:
        n_in, n_out = shape_of(shape)
        for number, bits in enumerate(options.bits):
            names = [name for name in (*OF_WORDS, "gradient") if name in wanted and (name in OF_WORDS or number == 0)]
            for line in of_words(n_in, n_out, bits, options) if names else ():
                if line.name in names:
                    yield f"{shape} {bits} bit g{options.group_size}", line
        if "float8" in wanted:
            yield f"{shape} {TOKENS} rows", float8(n_in, n_out)
        if "threshold" in wanted:
            yield f"{LAYERS}x{n_in}x{options.rank}", threshold(n_in, options.rank)
    if "optimizer" in wanted:
        yield options.model, optimizer(options.model, options)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["5120x13824", "4096x14336", "8192x28672"])
    layer_arguments(parser, bits=(4, 2, 3, 8))
    parser.add_argument("--only", nargs="+", default=EVERY, choices=EVERY)
    parser.add_argument("--model", default="qwen2.5-14b", help="whose adapters the optimizer updates")
    options = parser.parse_args()
    print(environment())
    lines = []
    for layer, line in lines_of(options):
        lines.append({"layer": layer} | measure(line))
        times = ", ".join(f"{column} {lines[-1][column]:.1f}" for column in (*line.columns, "bytes"))
        mark = "" if lines[-1]["agrees"] else "  DIFFERS"
        print(f"{layer:28} {line.name:10} {times}, error {lines[-1]['error']:.1e}{mark}", flush=True)
    write_json(options, {"lines": lines})
    sys.exit(0 if all(line["agrees"] for line in lines) else 1)


if __name__ == "__main__":
    main()
