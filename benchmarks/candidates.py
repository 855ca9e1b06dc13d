"""What tune.py tries: for every kernel the entry in use, a short list of others, and calls on random inputs.

Lists hold what compiles for Hopper and fills a program's registers without spilling much.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from common import copies
from matmul import Layer, random_stacks, random_x
from models import random_layer
from operations import CALLS

from lotaqaf_jax.kernels.adjust.blocks import (
    AdjustBlocks,
    can_pack,
    dequantize_blocks,
    merge_blocks,
    packed_blocks,
    packed_values,
    period_of,
)
from lotaqaf_jax.kernels.adjust.gpu import adjusted, dequantized, merged
from lotaqaf_jax.kernels.float8.blocks import TRANSPOSE, TransposeBlocks
from lotaqaf_jax.kernels.float8.gpu import transposed
from lotaqaf_jax.kernels.gradient.blocks import GradientBlocks, gradient_blocks, left_split, right_split
from lotaqaf_jax.kernels.gradient.gpu import left_product, right_product
from lotaqaf_jax.kernels.matmul.blocks import FewRows, ManyRows, bucket_of, matmul_blocks, shared_parts
from lotaqaf_jax.kernels.matmul.blocks import period_of as matmul_period_of
from lotaqaf_jax.kernels.matmul.gpu import fused
from lotaqaf_jax.kernels.matmul.matmul import layer_of, reference
from lotaqaf_jax.models import QuantSpec
from lotaqaf_jax.quant.weight import group_length

__all__ = ["CASES", "Case"]

DTYPE = jnp.bfloat16
MATMUL_CALLS = 32
"""Of one program, at least."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel on one layer: ``call(blocks)`` is a function of one of ``inputs``; results differ by ``tolerance``.

    They differ from ``truth`` of the first inputs, or, where there is none, from what the entry in use gives.
    """

    layer: str
    table: str
    current: Any
    candidates: Sequence[Any]
    inputs: Sequence[tuple[Any, ...]]
    call: Callable[[Any], Callable[..., Any]]
    tolerance: float = 0.0
    truth: Callable[..., Any] | None = None


def adjust_inputs(n_in: int, n_out: int, bits: int, options: argparse.Namespace) -> list[Any]:
    """(weight, adapter) of every call."""
    quant = QuantSpec(bits, options.group_size)
    count = copies(n_in * n_out * bits / 8, CALLS)
    return [random_layer(i, (n_in, n_out), quant, options.rank, options.omega)[:2] for i in range(count)]


def step_tiles(bits: int, options: argparse.Namespace) -> tuple[AdjustBlocks | None, list[AdjustBlocks]]:
    """The tile of the kernel that takes the steps, and others: packed where that kernel runs, plain elsewhere."""
    packs = can_pack(bits, options.rank)
    values = packed_values(bits) if packs else period_of(bits)[0]
    current = (packed_blocks if packs else merge_blocks)(bits, options.group_size)
    if current is None:
        return None, []
    # Products sum over 16 periods at least, and a tile holds whole groups.
    least = max(16, options.group_size // values)
    periods = [p for p in (16, 32, 64) if p >= least] or [least]
    tiles = [AdjustBlocks(*sizes) for sizes in itertools.product(periods, (32, 64, 128), (2, 4, 8))]
    # What a thread holds at once: all values of D, or one of every period; more spills.
    values, most = (values, 128) if packs else (1, 8)
    held = {tile: tile.periods * values * tile.columns / (32 * tile.num_warps) for tile in tiles}
    return current, [tile for tile in tiles if most / 4 <= held[tile] <= most]


def packed(n_in: int, n_out: int, options: argparse.Namespace) -> Iterator[Case]:
    """The adjusted weight in one pass; at high ranks the merge before dequantise."""
    for bits in options.bits:
        current, tiles = step_tiles(bits, options)
        if current is None:
            continue

        def call(blocks: AdjustBlocks) -> Any:
            return lambda w, t: adjusted(w, t, DTYPE, blocks=blocks)

        layer = f"{n_in}x{n_out} {bits} bit g{options.group_size}"
        table = "adjust/blocks.py, " + ("_PACKED" if can_pack(bits, options.rank) else "_PLAIN")
        yield Case(layer, table, current, tiles, adjust_inputs(n_in, n_out, bits, options), call)


def merge(n_in: int, n_out: int, options: argparse.Namespace) -> Iterator[Case]:
    """The same kernel, to words and mu."""
    for case in packed(n_in, n_out, options):

        def call(blocks: AdjustBlocks) -> Any:
            def run(w: Any, t: Any) -> Any:
                found, _ = merged(w, t, blocks=blocks)
                return found.qweight, found.offset

            return run

        yield dataclasses.replace(case, call=call)


def dequantize(n_in: int, n_out: int, options: argparse.Namespace) -> Iterator[Case]:
    """Merged words and mu to the weight."""
    for bits in options.bits:
        values, _ = period_of(bits)
        inputs = [
            (dataclasses.replace(w, offset=0.5 * w.zeros.astype(jnp.float32)),)
            for w, _ in adjust_inputs(n_in, n_out, bits, options)
        ]
        sizes = itertools.product((4, 8, 16, 32), (64, 128, 256), (4, 8))
        tiles = [AdjustBlocks(p, n, w) for p, n, w in sizes if 4 <= p * n / (32 * w) <= 32 and p * values <= 512]

        def call(blocks: AdjustBlocks) -> Any:
            return functools.partial(dequantized, dtype=DTYPE, blocks=blocks)

        layer = f"{n_in}x{n_out} {bits} bit g{options.group_size}"
        yield Case(layer, "adjust/blocks.py, _DEQUANTIZE", dequantize_blocks(bits), tiles, inputs, call)


# Rows, columns, warps, stages.
GRADIENT_TILES = (
    *((64, 64, 4, stages) for stages in (2, 3, 4)),
    *((64, 64, 8, stages) for stages in (3, 4)),
    *((64, 128, 4, stages) for stages in (2, 3)),
    (64, 128, 8, 3),
    (32, 128, 4, 3),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
)


def gradient_tiles(split: Any, current: GradientBlocks, n_in: int, n_out: int) -> list[GradientBlocks]:
    """Tiles with the programs of the rule, and the one in use with half and twice as many."""
    tiles = [split(GradientBlocks(*sizes), n_in, n_out) for sizes in GRADIENT_TILES]
    return [*tiles, *(dataclasses.replace(current, split=n) for n in {max(1, current.split // 2), 2 * current.split})]


def gradient_inputs(n_in: int, n_out: int, options: argparse.Namespace) -> list[Any]:
    """(weight, adapter, dweight) of every call; the width does not matter."""
    quant = QuantSpec(options.bits[0], options.group_size)
    count = copies(2 * n_in * n_out, CALLS)
    layers = [random_layer(i, (n_in, n_out), quant, options.rank, options.omega) for i in range(count)]
    return [(w, t, dweight.astype(DTYPE)) for w, t, dweight in layers]


def left(n_in: int, n_out: int, options: argparse.Namespace) -> Iterator[Case]:
    """P = (s * dW') @ B.T."""
    current, _ = gradient_blocks(n_in, n_out, jnp.dtype(DTYPE).itemsize)
    group = group_length(n_in, options.group_size)
    tiles = gradient_tiles(left_split, current, n_in, n_out)
    # A tile lies in one group or holds whole groups.
    tiles = [tile for tile in tiles if group % tile.rows == 0 or tile.rows % group == 0 or group == n_in]

    def call(blocks: GradientBlocks) -> Any:
        return lambda w, t, dweight: left_product(w, t.a, t.b, dweight, blocks)

    layer, inputs = f"{n_in}x{n_out} g{options.group_size}", gradient_inputs(n_in, n_out, options)
    yield Case(layer, "gradient/blocks.py, _LEFT", current, tiles, inputs, call, 1e-4)


def right(n_in: int, n_out: int, options: argparse.Namespace) -> Iterator[Case]:
    """Q = (A + m).T @ (s * dW')."""
    _, current = gradient_blocks(n_in, n_out, jnp.dtype(DTYPE).itemsize)
    group = group_length(n_in, options.group_size)
    # The kernel takes no more rows than a group has: of tiles that differ only beyond them, one.
    seen = {dataclasses.replace(current, rows=min(current.rows, group)): current}
    for tile in gradient_tiles(right_split, current, n_in, n_out):
        seen.setdefault(dataclasses.replace(tile, rows=min(tile.rows, group)), tile)
    tiles = list(seen.values())

    inputs = [
        (w, t.a, t.b, w.group_sum(t.a.astype(jnp.float32)) / w.group_rows(), dweight)
        for w, t, dweight in gradient_inputs(n_in, n_out, options)
    ]

    def call(blocks: GradientBlocks) -> Any:
        return functools.partial(right_product, blocks=blocks)

    layer = f"{n_in}x{n_out} g{options.group_size}"
    yield Case(layer, "gradient/blocks.py, _RIGHT", current, tiles, inputs, call, 1e-4)


def transpose(n_in: int, n_out: int, options: argparse.Namespace) -> Iterator[Case]:
    """dy (tokens, out) to float8, transposed."""
    del n_in
    keys = jax.random.split(jax.random.key(0), copies(2 * options.tokens * n_out, CALLS))
    inputs = [(jax.random.normal(key, (options.tokens, n_out), DTYPE), jnp.float32(2.0**7)) for key in keys]
    sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8))
    tiles = [TransposeBlocks(*size) for size in sizes if 16 <= size[0] * size[1] / (32 * size[2]) <= 64]

    def call(blocks: TransposeBlocks) -> Any:
        return lambda x, scale: transposed(x, scale, jnp.float8_e5m2, blocks=blocks)

    yield Case(f"{options.tokens}x{n_out}", "float8/blocks.py, TRANSPOSE", TRANSPOSE, tiles, inputs, call)


def matmul(n_in: int, n_out: int, options: argparse.Namespace) -> Iterator[Case]:
    """y = x @ W from a stack of packed words."""
    for bits, rows in itertools.product(options.bits, options.rows):
        group = group_length(n_in, options.group_size)
        current = matmul_blocks(rows, n_in, (n_out,), bits, group)
        if current is None:
            continue
        layer = Layer(n_in, (n_out,), bits, options.group_size, rows)
        stack = random_stacks(layer, offset=False)
        count = stack[0].qweight.shape[0]
        calls = max(MATMUL_CALLS, count)
        xs = random_x(layer, DTYPE, calls)
        inputs = [(xs[i], stack, jnp.full((1,), i % count, jnp.int32)) for i in range(calls)]

        def call(blocks: FewRows | ManyRows) -> Any:
            return lambda x, w, index: fused(x, w, [None], index, blocks)[0]

        tiles: list[Any]
        if isinstance(current, FewRows):
            tiles = few_rows_tiles(current, 4 * matmul_period_of(bits)[0], n_in, group)
            if current.rows == 16:
                # The other kernel, which would begin here if it were the faster.
                other = ManyRows(16, steps=current.steps, stages=5)
                tiles.append(dataclasses.replace(other, split=shared_parts(other, rows, n_in, (n_out,), bits)))
        else:
            tiles = many_rows_tiles(current, bucket_of(rows) or 0, layer)
        name = f"{n_in}x{n_out} {bits} bit g{options.group_size}, {rows} rows"
        yield Case(name, "matmul/blocks.py", current, tiles, inputs, call, 5e-3, in_float32)


def few_rows_tiles(current: FewRows, depth: int, n_in: int, group: int) -> list[FewRows]:
    """How much is in flight: steps of a round, rounds loaded ahead, warps; then parts of k, order, and columns."""
    whole = group >= n_in
    steps = [n for n in (1, 2, 4) if n == 1 or whole or group % (n * depth) == 0]
    flights = ((1, 0, 1), (1, 1, 2), (2, 0, 3), (2, 1, 3))
    tiles = [
        dataclasses.replace(current, steps=n, ahead=ahead, x_ahead=x_ahead, unroll=unroll)
        for n, (ahead, x_ahead, unroll) in itertools.product(steps, flights)
    ]
    warps = [n for n in (current.warps // 2, 2 * current.warps) if 1 <= n <= 16]
    tiles += [dataclasses.replace(current, warps=n) for n in warps]
    parts = {1, 2, current.split - 1, current.split + 1, 2 * current.split} - {0, current.split}
    tiles += [dataclasses.replace(current, split=split) for split in sorted(parts)]
    tiles += [dataclasses.replace(current, rotate=not current.rotate)]
    return [*tiles, dataclasses.replace(current, tiles=2)]


def in_float32(x: jax.Array, stacks: Sequence[Any], index: jax.Array) -> jax.Array:
    """The product of a layer by plain JAX, nothing rounded to 16 bits."""
    return reference(x.astype(jnp.float32), *layer_of(stacks[0], None, index))


# Rows, warps, halves and registers of a program.
MANY_ROWS = {
    32: ((32, 4, False, None), (32, 4, True, 96), (32, 8, False, None)),
    64: ((64, 4, True, 168), (64, 4, True, None), (64, 4, False, None), (64, 8, True, None)),
    128: ((64, 8, True, None), (64, 8, False, None), (64, 4, True, 168), (128, 4, True, None)),
}


def many_rows_tiles(current: ManyRows, bucket: int, layer: Layer) -> list[ManyRows]:
    """Programs by the registers they take, in as many parts as the rule says; then other parts, and loads ahead."""
    tiles = []
    for rows, warps, halves, registers in MANY_ROWS[bucket]:
        tile = dataclasses.replace(current, rows=rows, warps=warps, halves=halves, registers=registers)
        split = shared_parts(tile, layer.rows, layer.n_in, layer.widths, layer.bits)
        tiles.append(dataclasses.replace(tile, split=split))
    parts = {current.split // 2, current.split * 2 // 3, current.split * 3 // 2, 2 * current.split} - {0}
    tiles += [dataclasses.replace(current, split=split) for split in sorted(parts)]
    return [*tiles, *(dataclasses.replace(current, stages=current.stages + more) for more in (-1, 1))]


CASES: dict[str, Callable[[int, int, argparse.Namespace], Iterator[Case]]] = {
    "packed": packed,
    "merge": merge,
    "dequantize": dequantize,
    "left": left,
    "right": right,
    "transpose": transpose,
    "matmul": matmul,
}
