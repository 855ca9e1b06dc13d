"""Compile every Triton kernel without a card, for Hopper and for Ampere; prints a JSON list of what was compiled.

A program of its own, run by test_compile.py: in the test process the kernels have been defined for the interpreter.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lotaqaf_jax.kernels.adjust.gpu as adjust
import lotaqaf_jax.kernels.cached.gpu as cached
import lotaqaf_jax.kernels.float8.gpu as float8
import lotaqaf_jax.kernels.gradient.gpu as gradient
import lotaqaf_jax.kernels.matmul.gpu as matmul
import lotaqaf_jax.kernels.norm.gpu as norm
from lotaqaf_jax.kernels import TernaryAdapter
from lotaqaf_jax.kernels.adjust.blocks import can_pack
from tests.kernels.machine_code import early_writes
from tests.weights import Grid, quantized, random_numbers, random_ternary

NAMES = {"int32": "i32", "uint8": "u8", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "i8"}
NAMES |= {"float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"}
GRIDS = (Grid(4, 128, 256, 64), Grid(2, 128, 64, 64), Grid(3, 128, 64, 32), Grid(8, 128, 64, 64), Grid(4, 96, 32, -1))

compiled: list[dict[str, Any]] = []


def kind_of(value: Any) -> str:
    """The type of a parameter, as Triton writes it."""
    if isinstance(value, int | float):
        return "fp32" if isinstance(value, float) else "i32"
    return "*" + NAMES[jnp.dtype(value.dtype).name]


def record(
    kernel: Any,
    *inputs: Any,
    out: Any,
    num_warps: int,
    num_stages: int,
    fuse: bool = False,
    registers: int | None = None,
    **rest: Any,
) -> list[Any]:
    """Stands in for a launch: compiles, and returns zeros."""
    constants = {name: value for name, value in rest.items() if name not in ("grid", "aliases")}
    names = kernel.arg_names
    kinds = dict(zip(names, [kind_of(value) for value in (*inputs, *out)], strict=False))
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in kinds.items() if kind.startswith("*")}
    source = ASTSource(
        kernel,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    # Ampere does not round to float8; and the plain merge of 3 bits takes as long as those of all other widths.
    name = kernel.fn.__name__
    hopper = any(kind.startswith("*fp8") for kind in kinds.values()) or (name, rest.get("BITS")) == ("merge_kernel", 3)
    for capability in (90,) if hopper else (90, 80):
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuse, "maxnreg": registers}
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        early = early_writes(built.asm["cubin"]) if capability == 90 else []
        compiled.append({"kernel": name, "capability": capability, "shared": built.metadata.shared, "early": early})
    return [jnp.zeros(o.shape, o.dtype) for o in out]


def main() -> None:
    """Go through the widths."""
    for module in (adjust, cached, float8, gradient, matmul, norm):
        module.launch = record  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    for grid in GRIDS:
        w = quantized(random_numbers(rng, grid), grid)
        a, b = (jnp.asarray(random_ternary(rng, *shape)) for shape in ((grid.n_in, 64), (64, grid.n_out)))
        adapter = TernaryAdapter(a, b, 14.0, "reference", jnp.dtype(jnp.float32))
        merged, _ = adjust.merged(w, adapter, count=True)
        adjust.dequantized(merged, jnp.bfloat16)
        adjust.adjusted(w, adapter, jnp.bfloat16)
        adjust.adjusted(w, dataclasses.replace(adapter, offset="none"), jnp.float32)
        if not can_pack(grid.bits, rank := 136 if grid.bits == 2 else 264):  # as low as it is not packed
            a_, b_ = (jnp.asarray(random_ternary(rng, *shape)) for shape in ((grid.n_in, rank), (rank, grid.n_out)))
            adjust.merged(w, dataclasses.replace(adapter, a=a_, b=b_))
        narrow = dataclasses.replace(grid, n_out=grid.n_out // 2)
        narrow = quantized(random_numbers(rng, narrow), narrow)
        if gradient.fits_tiles(w):
            for dtype in (jnp.bfloat16, jnp.float32) if grid is GRIDS[0] else (jnp.bfloat16,):
                for surrogate in ("straight", "window"):
                    rule: Any = {"omega": 14.0, "offset": "reference", "surrogate": surrogate}
                    gradient.adapter_gradients(w, a, b, jnp.zeros(w.shape, dtype), **rule)
            for rows, weights in ((1, [w]), (64, [w]), (128, [w]), (1, [w, narrow, narrow])):
                matmul.matmul(jnp.zeros((rows, grid.n_in), jnp.bfloat16), weights, [None] * len(weights), None)
    for batch, slots in ((64, 128), (1, 2048)):
        q, k = (jnp.zeros((batch, 1, n, 128), jnp.bfloat16) for n in (40, 8))
        angles, stack = jnp.zeros((batch, 1, 1, 64)), jnp.zeros((1, batch, 8, slots, 128), jnp.bfloat16)
        cached.attention(q, k, k, (angles, angles), stack, stack, jnp.ones((batch, slots), bool), 0, 0)
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        float8.transposed(x := jnp.zeros((128, 64), jnp.bfloat16), float8.largest(x), dtype)
    for size, parts in ((5120, 0), (100, 2)):
        x, stack = jnp.zeros((8, size), jnp.bfloat16), jnp.zeros((2, size), jnp.float16)
        norm.add_norm(x, jnp.zeros((parts, 8, size), jnp.float32) if parts else x, stack, 1e-6, 0)
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
