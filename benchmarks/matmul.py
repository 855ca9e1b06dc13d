"""The packed matmul against its peers: y = x @ W for the few rows of a decoding step, on one NVIDIA card.

    python benchmarks/matmul.py [--bits 4] [--rows 1 8 16 32 64 128] [--shapes 5120x13824 ...] [--json matmul.json]

Claim: decoding reads the packed words about once. A shape 5120x5120+1024+1024 is three weights of one x. Columns of the
table, microseconds a call:

* packed: :func:`lotaqaf_jax.kernels.matmul.packed_matmul_many` on stacks of layers, which it reads in place;
* apart: the same with a call for every weight, where there are several;
* merged: the same with an offset; float32: with a float32 x (only with --more);
* dequant: the path that makes W with a kernel and multiplies with cuBLAS;
* tinygemm: torch's ``_weight_int4pack_mm`` (4 bit, groups of 32, 64 or 128); cublas: x @ W in bfloat16;
* bytes: what reading words, scales and zeros once takes at the bandwidth of a device copy.

Peers take the columns of several weights as one matrix.

Every case is first compared with float64 on 128 columns; ``error`` is ||y - truth|| / ||truth||, and a bfloat16 output
alone makes 1.7e-3 of it. Weights are random, never zeros, and calls go round more copies of them than the L2 cache
holds.

Our calls are written out in one compiled program that does nothing else, each with an x of its own. Their time is that
of all that runs on the device, by JAX's profiler: the median of three runs after a first, over the number of calls. The
host's launches, which take longer than a small product, and the gaps that they leave are not in it. The peers' calls
are one CUDA graph, timed by events around it: what there is between its kernels, about a microsecond a call, is in
theirs. Needs a CUDA build of JAX, Triton and jax-triton; the peers need torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too

import jax
import jax.numpy as jnp
import numpy as np
from common import COPY, copies, device_seconds, environment, write_json

from lotaqaf_jax.kernels.adjust.gpu import dequantized
from lotaqaf_jax.kernels.matmul import packed_matmul, packed_matmul_many
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.quant.packing import packed_size
from lotaqaf_jax.quant.weight import group_count, trivial_g_idx

SHAPES = {
    "Qwen2.5-14B": (
        "5120x13824",
        "13824x5120",
        "5120x5120",
        "5120x1024",
        "5120x13824+13824",
        "5120x5120+1024+1024",
    ),
    "Llama-3.1-8B": ("4096x14336", "14336x4096", "4096x4096", "4096x1024"),
    "Llama-3.1-70B": ("8192x28672", "28672x8192"),
}
CALLS = 40
"""Of one program, at least."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is measured: weights (in, width) of one x, their quantisation and the number of rows."""

    n_in: int
    widths: tuple[int, ...]
    bits: int
    group_size: int
    rows: int

    @property
    def n_out(self) -> int:
        """Columns of all weights."""
        return sum(self.widths)

    @property
    def groups(self) -> int:
        """Number of groups along the inputs."""
        return group_count(self.n_in, self.group_size)

    @property
    def packed_bytes(self) -> int:
        """Bytes of words, float16 scales and zeros."""
        return 4 * packed_size(self.n_in, self.bits) * self.n_out + 3 * self.groups * self.n_out


def random_stacks(layer: Layer, offset: bool) -> list[QuantizedWeight]:
    """A stack of random weights for every width, large enough that the cache does not hold them."""
    return [random_stack(layer, width, offset, seed) for seed, width in enumerate(layer.widths)]


def random_stack(layer: Layer, width: int, offset: bool, seed: int) -> QuantizedWeight:
    """One of them."""
    count = copies(layer.packed_bytes)
    keys = jax.random.split(jax.random.key(seed), 4)
    grid = (count, layer.groups, width)
    words = jax.random.bits(keys[0], (count, packed_size(layer.n_in, layer.bits), width), jnp.uint32)
    return QuantizedWeight(
        qweight=jax.lax.bitcast_convert_type(words, jnp.int32),
        scales=jax.random.uniform(keys[1], grid, jnp.float32, 0.002, 0.012).astype(jnp.float16),
        zeros=jax.random.randint(keys[2], grid, 0, 2**layer.bits).astype(jnp.uint8),
        g_idx=None,
        offset=jax.random.uniform(keys[3], grid, jnp.float32, -0.5, 0.5).astype(jnp.float16) if offset else None,
        bits=layer.bits,
        group_size=layer.group_size,
        shape=(layer.n_in, width),
    )


def random_x(layer: Layer, dtype: Any, count: int) -> list[jax.Array]:
    """``count`` different x, each (rows, in)."""
    x = jax.random.normal(jax.random.key(7), (count, layer.rows, layer.n_in), jnp.float32).astype(dtype)
    return list(x)


def relative_error(y: jax.Array, x: jax.Array, w: QuantizedWeight, index: int) -> float:
    """||y - truth|| / ||truth|| over 128 columns, the truth in float64."""
    columns = np.unique(np.linspace(0, w.shape[1] - 1, 128).astype(int))
    words = np.asarray(w.qweight[index][:, columns]).view(np.uint32).astype(np.uint64)
    bit = np.arange(w.shape[0], dtype=np.int64) * w.bits
    stream = np.concatenate([words, np.zeros((1, len(columns)), np.uint64)])
    pairs = stream[bit // 32] | stream[bit // 32 + 1] << np.uint64(32)
    q = (pairs >> (bit % 32).astype(np.uint64)[:, None]) & np.uint64(2**w.bits - 1)
    group = trivial_g_idx(w.shape[0], w.group_size)

    def spread(per_group: jax.Array) -> np.ndarray:
        return np.asarray(per_group[index][:, columns], np.float64)[group]

    steps = q.astype(np.float64) - spread(w.zeros) + (0 if w.offset is None else spread(w.offset))
    truth = np.asarray(x, np.float64) @ (spread(w.scales) * steps)
    return float(np.linalg.norm(np.asarray(y, np.float64)[:, columns] - truth) / np.linalg.norm(truth))


Product = Callable[[jax.Array, Sequence[QuantizedWeight], jax.Array], Sequence[jax.Array]]


def ours(product: Product, layer: Layer, dtype: Any = jnp.bfloat16, offset: bool = False) -> Any:
    """(microseconds of the device for a call, relative error) of ``product(x, stacks, layer index)``."""
    w = random_stacks(layer, offset)
    count = w[0].qweight.shape[0]
    calls = max(CALLS, count)
    # Every call has an x of its own: XLA computes equal calls once.
    x = random_x(layer, dtype, calls)
    index = [jnp.full((1,), i % count, jnp.int32) for i in range(calls)]
    many = jax.jit(lambda x, w, index: [product(one, w, at) for one, at in zip(x, index, strict=True)])
    error = max(relative_error(y, x[1], one, 1) for y, one in zip(many(x, w, index)[1], w, strict=True))
    return device_seconds(lambda: jax.block_until_ready(many(x, w, index))) / calls * 1e6, error


def packed(x: jax.Array, weights: Sequence[QuantizedWeight], index: jax.Array) -> Sequence[jax.Array]:
    """The kernel, as chosen by itself."""
    return packed_matmul_many(x, weights, layer=index, implementation="triton")


def apart(x: jax.Array, weights: Sequence[QuantizedWeight], index: jax.Array) -> Sequence[jax.Array]:
    """The kernel, launched for every weight."""
    return [packed_matmul(x, w, layer=index, implementation="triton") for w in weights]


def through_w(x: jax.Array, weights: Sequence[QuantizedWeight], index: jax.Array) -> Sequence[jax.Array]:
    """W by a kernel, then cuBLAS; the slice of the stack is part of it."""
    layers = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index[0], keepdims=False), list(weights))
    return [x @ dequantized(w, x.dtype) for w in layers]


def torch_graph(call: Callable[[int], Any], copies: int, calls: int = 40) -> float:
    """Microseconds of ``call(copy)``, from CUDA events around replays of a graph of ``calls`` calls."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                call(i % copies)
        graph.replay()
        times = []
        for _ in range(9):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / calls * 1e3)
    return statistics.median(times)


def cublas(layer: Layer) -> float:
    """x @ W in bfloat16 through torch."""
    import torch

    count = copies(2 * layer.n_in * layer.n_out)
    w = torch.randn((count, layer.n_in, layer.n_out), device="cuda", dtype=torch.bfloat16)
    x = torch.randn((layer.rows, layer.n_in), device="cuda", dtype=torch.bfloat16)
    return torch_graph(lambda i: x @ w[i], count)


def tinygemm(layer: Layer) -> float | None:
    """torch's 4 bit kernel, zero points as floats; None where it has none for the layer."""
    import torch

    if layer.bits != 4 or layer.group_size not in (32, 64, 128) or layer.n_in % 1024:
        return None
    count = copies(layer.packed_bytes)
    bytes_ = torch.randint(0, 256, (layer.n_out, layer.n_in // 2), device="cuda", dtype=torch.uint8)
    w = [torch.ops.aten._convert_weight_to_int4pack(bytes_.roll(i, 0), 8) for i in range(count)]
    grid = (count, layer.groups, layer.n_out, 2)
    s = torch.rand(grid, device="cuda", dtype=torch.bfloat16) * 0.01 + 0.002
    x = torch.randn((layer.rows, layer.n_in), device="cuda", dtype=torch.bfloat16)
    return torch_graph(lambda i: torch.ops.aten._weight_int4pack_mm(x, w[i], layer.group_size, s[i]), count)


def measure(layer: Layer, more: bool, peers: bool) -> dict[str, Any]:
    """One line of the table."""
    line: dict[str, Any] = dataclasses.asdict(layer) | {"bytes": layer.packed_bytes / COPY * 1e6}
    line["packed"], line["error"] = ours(packed, layer)
    if len(layer.widths) > 1:
        line["apart"], line["apart_error"] = ours(apart, layer)
    if more:
        line["merged"], line["merged_error"] = ours(packed, layer, offset=True)
        line["float32"], line["float32_error"] = ours(packed, layer, dtype=jnp.float32)
        line["dequant"], line["dequant_error"] = ours(through_w, layer)
    if peers:
        line["tinygemm"], line["cublas"] = tinygemm(layer), cublas(layer)
    return line


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as a table."""
    times = ("packed", "apart", "merged", "float32", "dequant", "tinygemm", "cublas", "bytes")
    rows = [("in x out", "bits", "group", "rows", *times, "error")]
    for line in lines:
        found = [line.get(name) for name in times]
        rows.append(
            (
                f"{line['n_in']}x{'+'.join(map(str, line['widths']))}",
                *(str(line[name]) for name in ("bits", "group_size", "rows")),
                *("" if value is None else f"{value:.1f}" for value in found),
                f"{line['error']:.1e}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [shape for shapes in SHAPES.values() for shape in shapes]
    parser.add_argument("--shapes", nargs="+", default=every, help="in x out, 5120x13824 or 5120x5120+1024+1024")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--groups", nargs="+", type=int, default=[64])
    parser.add_argument("--more", action="store_true", help="also with an offset, float32, and through W")
    parser.add_argument("--no-peers", action="store_true", help="without torch")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    print(environment())
    lines = []
    for shape in options.shapes:
        n_in, widths = shape.split("x")
        for bits in options.bits:
            for group in options.groups:
                for rows in options.rows:
                    layer = Layer(int(n_in), tuple(map(int, widths.split("+"))), bits, group, rows)
                    lines.append(measure(layer, options.more, not options.no_peers))
                    print(table(lines[-1:]).splitlines()[1], flush=True)
    print(table(lines))
    write_json(options, {"calls": CALLS, "lines": lines})


if __name__ == "__main__":
    main()
