"""The training kernels against plain JAX, on one layer of real shapes: microseconds a call.

    python benchmarks/kernels.py [--shapes 5120x13824 ...] [--bits 4]

* adjusted: adapters to the adjusted bfloat16 weight; merge: to merged words and offset; dequantize: merged words to
  bfloat16; gradient: the gradients of the adapters from that of the weight, bfloat16.
* bytes: what reading the words and writing the bfloat16 weight once takes at the bandwidth of a device copy.

Every call is first compared with plain JAX: bit for bit, and the gradient by relative error. One compiled program makes
many calls, each on a random weight of its own, and returns one element of each; a shorter program takes the time of
launch and waiting off.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from common import COPY, environment, layer_arguments, seconds_of, shape_of, write_json
from models import random_weight

from lotaqaf_jax.kernels import TernaryAdapter, merge_adapter, weight_matrix
from lotaqaf_jax.kernels.gradient import gpu as gradient_gpu
from lotaqaf_jax.models import QuantSpec
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.ternary import adapter_gradients

CALLS = 24
Call = Callable[[QuantizedWeight, TernaryAdapter, jax.Array], jax.Array]


def calls(implementation: str) -> dict[str, Call]:
    """What is timed."""

    def gradient(w: QuantizedWeight, t: TernaryAdapter, dweight: jax.Array) -> jax.Array:
        function: Any = gradient_gpu.adapter_gradients if implementation == "triton" else adapter_gradients
        da, db = function(w, t.a, t.b, dweight, omega=t.omega, offset=t.offset)
        return jnp.concatenate([da.T, db], axis=1)

    return {
        "adjusted": lambda w, t, _: weight_matrix(w, t, jnp.bfloat16, implementation),
        "merge": lambda w, t, _: merge_adapter(w, t, implementation).qweight,
        "dequantize": lambda w, t, _: weight_matrix(w, None, jnp.bfloat16, implementation),
        "gradient": gradient,
    }


def microseconds(call: Call, inputs: list[tuple[Any, ...]]) -> float:
    """Of one call. Every call has a weight of its own: XLA computes equal calls once."""

    def many(number: int) -> Any:
        run = jax.jit(lambda inputs: [call(*one)[0, :1] for one in inputs])
        return lambda: jax.block_until_ready(run(inputs[:number]))

    return (seconds_of(many(CALLS)) - seconds_of(many(CALLS // 4))) / (CALLS - CALLS // 4) * 1e6


def measure(n_in: int, n_out: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lines of the table for one shape."""
    inputs = []
    for i in range(CALLS):
        keys = jax.random.split(jax.random.key(i), 4)
        w = random_weight(keys[0], (n_in, n_out), QuantSpec(options.bits, options.group_size))
        a = jax.random.randint(keys[1], (n_in, options.rank), -1, 2, jnp.int8)
        b = jax.random.randint(keys[2], (options.rank, n_out), -1, 2, jnp.int8)
        dweight = jax.random.normal(keys[3], (n_in, n_out), jnp.bfloat16)
        inputs.append((w, TernaryAdapter(a, b, options.omega, "reference", jnp.dtype(jnp.float32)), dweight))
    least = (inputs[0][0].qweight.nbytes + 2 * n_in * n_out) / COPY * 1e6
    lines = []
    plain, fused = calls("xla"), calls("triton")
    for name in options.only or plain:
        truth, found = (np.asarray(jax.jit(c[name])(*inputs[0]), np.float32) for c in (plain, fused))
        error = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
        if error > (5e-3 if name == "gradient" else 0):
            raise SystemExit(f"{name} {n_in}x{n_out}: relative error {error} against plain JAX")
        times = {key: microseconds(c[name], inputs) for key, c in (("xla", plain), ("triton", fused))}
        lines.append({"call": name, "n_in": n_in, "n_out": n_out, **times, "bytes": least, "error": error})
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["5120x13824", "4096x14336", "8192x28672"])
    layer_arguments(parser)
    parser.add_argument("--only", nargs="+", help="some of adjusted, merge, dequantize, gradient")
    options = parser.parse_args()
    print(environment())
    lines = []
    for shape in options.shapes:
        for line in measure(*shape_of(shape), options):
            lines.append(line)
            times = ", ".join(f"{key} {line[key]:.1f}" for key in ("xla", "triton", "bytes"))
            print(f"{shape} {options.bits} bit g{options.group_size} {line['call']:10} {times}", flush=True)
    write_json(options, {"lines": lines})


if __name__ == "__main__":
    main()
