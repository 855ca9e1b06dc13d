"""Run every kernel: over widths, groups, orders and odd sizes, attention over a cache over heads, rows and slots; and
all of them together, in small models that train, merge and write.

    python benchmarks/check_kernels.py [--jobs 4]

One line a case. Weights and merged words must equal the plain JAX implementation bit for bit, products of one weight
in two places of a launch each other. Gradients and products are compared with plain JAX, or with float64, by relative
error (norm of the difference over the norm). A residual sum, numbers rounded to float8, and caches that attention has
written to, must equal plain JAX bit for bit; a norm is float64's but for two roundings, and what attention gathers is
compared with float64. In models, kernels run in loops over stacks of layers, within other programs: words and mu of a
merge must again be equal, losses and norms of gradients agree with plain JAX, and generated tokens with the forward
pass. Repeats run the kernels of a weight 200 times, at a size at which programs share processors, and every run has to
give the bits of the first. That is sharper where other programs are on the card at the same instant (--jobs under
NVIDIA's MPS), which is how a product read too early has been found. Exit status 1 if a case fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the card

import jax
import jax.numpy as jnp
import numpy as np
from agreement import generation_gap, merge_differs, step_differences, with_random_adapters
from common import environment, relative_error
from models import random_decoder

from lotaqaf_jax.generation import generate
from lotaqaf_jax.kernels import TernaryAdapter, merge_adapter, quantized_linear, weight_matrix
from lotaqaf_jax.kernels.cached import cached_attention
from lotaqaf_jax.kernels.choose import ADA, choose, compute_capability, missing_for_triton
from lotaqaf_jax.kernels.float8.product import quantized_columns
from lotaqaf_jax.kernels.matmul import packed_matmul, packed_matmul_many
from lotaqaf_jax.kernels.norm import add_norm
from lotaqaf_jax.kernels.rope import apply_rope
from lotaqaf_jax.models import QuantSpec, add_adapters, merge
from lotaqaf_jax.models.presets import preset
from lotaqaf_jax.quant import QuantizedWeight
from tests.weights import Grid, quantized, random_numbers, random_ternary

GRIDS = (
    *(Grid(bits, 1024, 512, size) for bits in (2, 3, 4, 8) for size in (32, 64, 128)),
    *(Grid(bits, 300, 41, 32) for bits in (2, 3, 4, 8)),
    *(Grid(bits, 200, 70, -1) for bits in (2, 3, 4, 8)),
    Grid(4, 96, 16, 48),
    Grid(4, 512, 128, 64, act_order=True),
    Grid(3, 100, 33, 32, act_order=True),
)
RULES = (("reference", jnp.float32), ("paper", jnp.bfloat16), ("reference", jnp.float16), ("none", jnp.float32))
RANKS = ((64, 14.0), (24, 4.3), (128, 20.5))
# Ranks that the packed kernel does not take.
HIGH_RANKS = ((2, 136), (3, 264), (4, 264))
# Bits, group size, offset, activations' type, layers in all.
MODELS = (
    (4, 64, "reference", "bfloat16", 3),
    (3, 32, "none", "float32", 2),
    (2, -1, "paper", "bfloat16", 4),
)
SMALL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1152,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
}
# Weight, offset, surrogate.
REPEATED: tuple[tuple[Grid, Any, Any], ...] = (
    (Grid(4, 2048, 5632, 64), "reference", "straight"),
    (Grid(3, 2048, 5632, 32), "paper", "window"),
    (Grid(2, 2048, 5632, 128), "none", "window"),
    (Grid(8, 2048, 5632, 128), "none", "straight"),
)
REPEATS = 200
TOLERANCE = {"gradients": 5e-3, "product": 4e-3, "bfloat16": 6e-3, "float16": 1e-3, "loss": 1e-3, "norms": 2e-2}
GAP = 0.5
"""Standard deviations of the logits by which a generated token may miss the greatest."""
# Rows, size, parts of the update (0: whole) and type.
NORMS = tuple(itertools.product((1, 64, 128), (100, 896, 5120, 16384), (0, 2, 4), ("bfloat16", "float16")))
# (heads, kv_heads), (rows, slots), the type of everything, head_dim.
_SIZES = tuple(
    itertools.product(((40, 8), (32, 8), (4, 1)), ((1, 64), (1, 300), (1, 1000), (3, 300), (3, 1000), (64, 300)))
)
ATTENTION = tuple((*size, kind, head_dim) for size in _SIZES for kind, head_dim in (("bfloat16", 128), ("float16", 64)))
# (rows, columns) and type.
FLOAT8 = tuple(itertools.product(((8192, 5120), (300, 41), (64, 16)), (jnp.float8_e4m3fn, jnp.float8_e5m2)))


def outputs(implementation: str) -> Any:
    """All that one implementation makes of a weight and its adapters, in one program."""

    def run(w: Any, adapter: TernaryAdapter, x: jax.Array, dy: jax.Array, bias: jax.Array) -> dict[str, Any]:
        merged = merge_adapter(w, adapter, implementation)
        floats = dataclasses.replace(adapter, a=adapter.a.astype(jnp.float32), b=adapter.b.astype(jnp.float32))
        _, pull = jax.vjp(lambda x, t: quantized_linear(x, w, t, implementation=implementation), x, floats)
        dx, dadapter = pull(dy)
        return {
            "float32": weight_matrix(w, adapter, jnp.float32, implementation),
            "bfloat16": weight_matrix(w, adapter, jnp.bfloat16, implementation),
            "merged": weight_matrix(merged, None, jnp.bfloat16, implementation),
            "words": merged.qweight,
            "mu": merged.offset,
            "gradients": (dx, dadapter.a, dadapter.b),
            "product": [packed_matmul(x[:rows], merged, implementation=implementation) for rows in (1, 16, 64)],
            "biased": packed_matmul(x[:1], merged, bias, implementation=implementation),
            "together": packed_matmul_many(x[:1], (merged, half(merged), merged), implementation=implementation),
        }

    return jax.jit(run)


def half(w: QuantizedWeight) -> QuantizedWeight:
    """The first half of the columns."""
    n_out = w.shape[1] // 2
    arrays = {name: getattr(w, name)[:, :n_out] for name in ("qweight", "scales", "zeros")}
    offset = None if w.offset is None else w.offset[:, :n_out]
    return dataclasses.replace(w, **arrays, offset=offset, shape=(w.shape[0], n_out))


def check(number: int) -> tuple[bool, str]:
    """Whether one case passes, and its line."""
    grid, (offset, dtype), (rank, omega) = GRIDS[number], RULES[number % 4], RANKS[number % 3]
    rng = np.random.default_rng(number)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = random_ternary(rng, grid.n_in, rank), random_ternary(rng, rank, grid.n_out)
    surrogate: Any = ("straight", "window")[number // 4 % 2]
    adapter = TernaryAdapter(jnp.asarray(a), jnp.asarray(b), omega, offset, jnp.dtype(dtype), surrogate=surrogate)
    x = jnp.asarray(rng.normal(size=(64, grid.n_in)), jnp.bfloat16)
    dy = jnp.asarray(rng.normal(size=(64, grid.n_out)), jnp.bfloat16)
    bias = np.asarray(rng.normal(size=grid.n_out), jnp.bfloat16)
    truth, found = (jax.device_get(outputs(one)(w, adapter, x, dy, bias)) for one in ("xla", "triton"))
    wrong = [key for key in ("float32", "bfloat16", "words", "mu") if not _equal(found[key], truth[key])]
    wrong += ["merged"] if not _equal(found["merged"], found["bfloat16"]) else []
    exact = np.asarray(x, np.float64) @ np.asarray(truth["float32"], np.float64)
    errors = {
        "gradients": relative_error(found["gradients"], truth["gradients"]),
        "product": relative_error(
            [*found["product"], *found["together"][:2], found["biased"]],
            [*(exact[:rows] for rows in (1, 16, 64)), exact[:1], exact[:1, : grid.n_out // 2], exact[:1] + bias],
        ),
    }
    # The first and the third of the weights in one launch are the same.
    wrong += ["together"] if not _equal(found["together"][0], found["together"][2]) else []
    wrong += [key for key, value in errors.items() if not value <= TOLERANCE[key]]
    numbers = ", ".join(f"{key} {value:.1e}" for key, value in errors.items())
    name = f"{grid!s:26} r{rank:<4} {offset:9} {surrogate:8} mu {jnp.dtype(dtype).name:8}"
    return _result(f"{name} {numbers:40}", wrong)


def check_repeats(number: int) -> tuple[bool, str]:
    """Whether all runs of one weight's kernels give the same bits, and the line that says so."""
    grid, offset, surrogate = REPEATED[number]
    rng = np.random.default_rng(number)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = (jnp.asarray(random_ternary(rng, *shape)) for shape in ((grid.n_in, 64), (64, grid.n_out)))
    adapter = TernaryAdapter(a, b, 14.0, offset, jnp.dtype(jnp.float32), surrogate=surrogate)
    x, dy, bias = (
        jnp.asarray(rng.normal(size=n), jnp.bfloat16) for n in ((64, grid.n_in), (64, grid.n_out), grid.n_out)
    )
    run = outputs("triton")
    first = run(w, adapter, x, dy, bias)
    differing = jax.jit(lambda one, other: jax.tree.map(lambda p, q: jnp.any(p != q).astype(jnp.int32), one, other))
    counts = differing(first, first)
    for _ in range(REPEATS):
        counts = jax.tree.map(jnp.add, counts, differing(first, run(w, adapter, x, dy, bias)))
    wrong = [f"{jax.tree_util.keystr(path)} {int(n)} times" for path, n in jax.tree.leaves_with_path(counts) if n]
    return _result(f"{f'{grid!s:26} {offset:9} {surrogate:8} {REPEATS} runs':76}", wrong)


def check_high_rank(number: int) -> tuple[bool, str]:
    """Whether the plain merge gives the weight, words and mu, and its line."""
    bits, rank = HIGH_RANKS[number]
    grid = Grid(bits, 300, 70, 64)
    rng = np.random.default_rng(number)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = (jnp.asarray(random_ternary(rng, *shape)) for shape in ((grid.n_in, rank), (rank, grid.n_out)))
    adapter = TernaryAdapter(a, b, 20.5, "reference", jnp.dtype(jnp.float32))

    def run(implementation: str) -> dict[str, Any]:
        merged = jax.jit(lambda w, t: merge_adapter(w, t, implementation))(w, adapter)
        weight = weight_matrix(w, adapter, jnp.float32, implementation)
        return {"weight": weight, "words": merged.qweight, "mu": merged.offset}

    found, truth = (jax.device_get(run(one)) for one in ("triton", "xla"))
    wrong = [key for key in truth if not _equal(found[key], truth[key])]
    name = f"{grid} rank {rank}"
    return _result(f"{name:76}", wrong)


def check_norm(number: int) -> tuple[bool, str]:
    """:func:`check` of a residual sum, bit for bit, and of its norm, in units in the last place off float64."""
    rows, size, parts, kind = NORMS[number]
    dtype, rng, eps = jnp.dtype(kind), np.random.default_rng(number), 1e-6
    x, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, size), (3, size)))
    update = jnp.asarray(rng.normal(size=(parts, rows, size) if parts else x.shape), jnp.float32 if parts else dtype)
    run = jax.jit(lambda *arrays: add_norm(*arrays[:3], eps, arrays[3], implementation="triton"))
    total, normed = jax.device_get(run(x, update, weight, jnp.int32(1)))
    # The twin runs op by op, since XLA may leave out a rounding between operations of one fusion.
    truth, _ = jax.device_get(add_norm(x, update, weight, eps, 1, implementation="xla"))
    wide = truth.astype(np.float64)
    exact = np.asarray(weight[1], np.float64) * wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps)
    # Rounded twice, by half a unit each; below the normal numbers of float16 a unit is fixed.
    error = np.max(np.abs(normed.astype(np.float64) - exact) / (float(jnp.finfo(dtype).eps) * np.abs(exact) + 1e-6))
    wrong = [name for name, good in (("sum", _equal(total, truth)), ("norm", error <= 1.01)) if not good]
    name = f"norm {rows} rows of {size}, {parts or 'no'} parts, {kind}"
    return _result(f"{name:60} {error:.2f}", wrong)


def check_attention(number: int) -> tuple[bool, str]:
    """:func:`check` of attention over a cache; a third of the slots is empty, and half of those of every other row."""
    (heads, kv_heads), (rows, slots), kind, head_dim = ATTENTION[number]
    rng = np.random.default_rng(number)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), kind)

    q, k, v = (normal(rows, 1, n, head_dim) for n in (heads, kv_heads, kv_heads))
    keys, values = (normal(2, rows, kv_heads, slots, head_dim) for _ in range(2))
    angles = jnp.asarray(1000 * rng.random((rows, 1, 1, head_dim // 2)), jnp.float32)
    rope, layer, slot = (jnp.cos(angles), jnp.sin(angles)), 1, int(rng.integers(slots))
    valid = np.broadcast_to(np.arange(slots) % 3 > 0, (rows, slots)).copy()
    valid[1::2, slots // 2 :] = False
    valid[:, slot] = True
    # Plain JAX op by op: within a program XLA contracts the rotation into operations that round otherwise.
    marked = jnp.asarray(valid)
    truth = cached_attention(q, k, v, rope, keys, values, marked, layer, slot, implementation="xla")
    valid = valid & (np.arange(slots) <= slot)
    exact = _attention(*jax.device_get((apply_rope(q, *rope), truth[1][layer], truth[2][layer])), valid)
    run = jax.jit(functools.partial(cached_attention, implementation="triton"), donate_argnums=(4, 5))
    found = run(q, k, v, rope, keys, values, marked, jnp.int32(layer), jnp.int32(slot))
    error = relative_error(found[0], exact)
    wrong = [name for i, name in ((1, "keys"), (2, "values")) if not _equal(found[i], truth[i])]
    wrong += [] if error <= TOLERANCE[kind] else ["attention"]
    name = f"attention {heads}/{kv_heads} heads of {head_dim}, {rows} rows, {slots} slots, {kind}"
    return _result(f"{name:62} error {error:.1e}", wrong)


def _attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """In float64: q (rows, 1, heads, head_dim), rotated, over one layer's (rows, kv_heads, slots, head_dim)."""
    rows, _, _, head_dim = q.shape
    grouped = q.astype(np.float64).reshape(rows, keys.shape[1], -1, head_dim)
    scores = grouped @ keys.astype(np.float64).swapaxes(2, 3) / np.sqrt(head_dim)
    scores = np.where(valid[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ values.astype(np.float64)).reshape(q.shape)


def check_float8(number: int) -> tuple[bool, str]:
    """:func:`check` of the largest value of a matrix, in its scale, and of the matrix rounded and transposed."""
    (rows, columns), dtype = FLOAT8[number]
    x = jnp.asarray(np.random.default_rng(number).normal(size=(rows, columns)), jnp.bfloat16)
    (one, scale), (other, expected) = (jax.device_get(quantized_columns(x, dtype, i)) for i in ("triton", "xla"))
    wrong = [name for name, equal in (("scale", scale == expected), ("columns", _equal(one, other))) if not equal]
    name = f"float8 {rows}x{columns} {jnp.dtype(dtype).name}"
    return _result(f"{name:76}", wrong)


def check_model(number: int) -> tuple[bool, str]:
    """:func:`check` of a model: a step, the merge of its stacks, and generation."""
    bits, group_size, offset, kind, layers = MODELS[number]
    config = dataclasses.replace(preset("qwen2.5-14b"), **SMALL, num_hidden_layers=layers)
    base = random_decoder(config, QuantSpec(bits, group_size), dtype=jnp.dtype(kind))
    model = with_random_adapters(add_adapters(base, 24, 4.3, offset))
    loss, norms = step_differences(model)
    wrong = [name for name, error in (("loss", loss), ("norms", norms)) if not error <= TOLERANCE[name]]
    wrong += [f"merge of {name}" for name in merge_differs(model)]
    merged, rows = merge(model), 5
    prompt = np.random.default_rng(number).integers(0, config.vocab_size, (rows, 20), dtype=np.int32)
    written = generate(merged, prompt, np.full(rows, 20, np.int32), max_new_tokens=40).tokens
    missed, gap = generation_gap(merged, prompt, np.asarray(written))
    wrong += ["generation"] if gap > GAP else []
    wrong += [f"merge in place of {name}" for name in merge_differs(model, donate=True)]
    numbers = f"loss {loss:.0e}, norms {norms:.0e}, other tokens {missed:.1%}"
    name = f"model of {layers} layers, {bits} bit, group {group_size}, {offset}, {kind}"
    return _result(f"{name:60} {numbers}", wrong)


def main() -> None:
    """Run all cases."""
    kinds: dict[str, tuple[Callable[[int], tuple[bool, str]], Sequence[Any]]] = {
        "models": (check_model, MODELS),  # they take longest
        "weights": (check, GRIDS),
        "ranks": (check_high_rank, HIGH_RANKS),
        "repeats": (check_repeats, REPEATED),
        "norm": (check_norm, NORMS),
        "attention": (check_attention, ATTENTION),
        "float8": (check_float8, FLOAT8),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(kinds), default=list(kinds))
    parser.add_argument("--jobs", type=int, default=4, help="processes that share the card; most time is compilation")
    options = parser.parse_args()
    if missing := missing_for_triton():
        sys.exit(f"no Triton kernels to check: {missing}")
    print(f"{environment()}, implementation {choose()}")
    if (compute_capability() or ADA) < ADA:
        kinds.pop("float8")  # Ampere has none
    results = []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        chosen = [kinds[name] for name in kinds if name in options.only]
        # All are queued before any is waited for.
        for lines in [pool.map(one, range(len(cases))) for one, cases in chosen]:
            for passed, line in lines:
                results.append(passed)
                print(line, flush=True)
    failed = results.count(False)
    print(f"{len(results)} cases, {failed} failed")
    sys.exit(1 if failed else 0)


def _result(name: str, wrong: Sequence[str]) -> tuple[bool, str]:
    """Whether nothing is wrong, and the line that says so."""
    return not wrong, f"{name} {'FAILED ' + ', '.join(wrong) if wrong else 'ok'}"


def _equal(found: Any, truth: Any) -> bool:
    return (found is None and truth is None) or np.array_equal(np.asarray(found), np.asarray(truth))


if __name__ == "__main__":
    main()
