"""Other block sizes for one kernel against the table's: microseconds of the device for a call, best first.

    python benchmarks/tune.py --only packed dequantize [--bits 4] [--shapes 5120x13824] [--rows 1 64] [--json tune.json]

It changes nothing: a person reads the lines and edits the table. Kernels and where their table is, in
lotaqaf_jax/kernels/:

* packed (adapters to the adjusted weight), merge (to merged words), dequantize: adjust/blocks.py;
* left, right (the two products of the adapters' gradients): gradient/blocks.py, tiles by the bytes of a value, how many
  programs share a sum by a rule;
* transpose (dy of 8192 rows to float8 and transposed): float8/blocks.py;
* matmul (the packed product of decoding): matmul/blocks.py, by bits and rows; how many warps or programs share a sum
  by a rule.

The entry in use is marked with *. Every other one must give its result: bit for bit, or, where sums run in another
order, to a relative error; all of matmul must give that of plain JAX in float32. Entries that do not compile, do not
fit the card, or give something else are named last.
Calls, inputs and time as in kernels.py. A tile that is best for one shape alone is seldom worth an entry: give several.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from candidates import CASES, Case
from common import device_seconds, environment, layer_arguments, relative_error, shape_of, write_json


@dataclasses.dataclass(frozen=True)
class Result:
    """One line: blocks and microseconds, or what is wrong with them."""

    blocks: Any
    current: bool
    microseconds: float | None
    error: float | None
    problem: str = ""

    def __str__(self) -> str:
        sizes = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(self.blocks).items())
        time = "         " if self.microseconds is None else f"{self.microseconds:9.1f}"
        return f"  {'*' if self.current else ' '} {time}  {sizes}{'  ' + self.problem if self.problem else ''}"


def program_of(case: Case, blocks: Any) -> Callable[[], Any]:
    """All calls in one program, which ends when the device has."""
    call = case.call(blocks)
    run = jax.jit(lambda inputs: [call(*one) for one in inputs])
    return lambda: jax.block_until_ready(run(case.inputs))


def attempt(case: Case, blocks: Any, truth: Any) -> Result:
    """Compile, compare and time one entry; what fails is a result too."""
    current = blocks == case.current
    run = program_of(case, blocks)
    try:
        error = relative_error(jax.device_get(run()[0]), truth)
        if error > case.tolerance:
            return Result(blocks, current, None, error, f"another result, relative error {error:.1e}")
        seconds = device_seconds(run)
    except Exception as problem:  # of the compiler, of the driver, of XLA: too many registers, too much shared memory
        first = next(iter(str(problem).strip().splitlines()), "")
        return Result(blocks, current, None, None, f"{type(problem).__name__}: {first[:160]}")
    return Result(blocks, current, seconds / len(case.inputs) * 1e6, error)


def tune(case: Case) -> list[Result]:
    """All entries, the fastest first and those that failed last."""
    if case.truth is not None:
        truth = jax.device_get(jax.jit(case.truth)(*case.inputs[0]))
    else:  # The entry in use must run: its failure is no candidate's.
        truth = jax.device_get(program_of(case, case.current)()[0])
    entries = list(dict.fromkeys([case.current, *case.candidates]))
    results = [attempt(case, blocks, truth) for blocks in entries]
    return sorted(results, key=lambda one: float("inf") if one.microseconds is None else one.microseconds)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--shapes", nargs="+", default=["5120x13824"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64], help="of x, for matmul")
    parser.add_argument("--tokens", type=int, default=8192, help="rows of dy, for transpose")
    layer_arguments(parser, bits=(4,))
    options = parser.parse_args()
    print(environment())
    tables = []
    for name in options.only:
        make: Callable[..., Any] = CASES[name]
        for shape in options.shapes:
            for case in make(*shape_of(shape), options):
                start = time.perf_counter()
                results = tune(case)
                print(f"{name} {case.layer}, table in {case.table} ({time.perf_counter() - start:.0f} s)")
                print("\n".join(map(str, results)), flush=True)
                tables.append(
                    {"kernel": name, "layer": case.layer, "results": [dataclasses.asdict(one) for one in results]}
                )
                write_json(options, {"tables": tables})


if __name__ == "__main__":
    main()
