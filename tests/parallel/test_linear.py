"""The quantised layer on a mesh: the numbers of one device, and merged words and mu to the bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels import GroupLowRank, TernaryAdapter, WeightAdapter, merge_adapter, quantized_linear
from lotaqaf_jax.kernels.sharded import merge_stack
from lotaqaf_jax.kernels.sharding import MatrixSharding, adapter_specs, shardings, weight_specs
from lotaqaf_jax.parallel import make_mesh
from lotaqaf_jax.quant import QuantizedWeight
from tests.weights import Grid, quantized, random_numbers, random_ternary

RANK = 6
GRIDS = {
    "rows": (Grid(3, 128, 48, 32), {"rows": True, "stored_columns": True, "stored_rows": True}),
    "columns": (Grid(4, 96, 64, 32), {"columns": True, "stored_columns": True, "stored_rows": True}),
    "act-order": (Grid(4, 96, 64, 32, act_order=True), {"columns": True, "stored_columns": True, "stored_rows": True}),
    "one group": (Grid(2, 96, 64, -1), {"columns": True, "stored_columns": True}),
    "not stored": (Grid(4, 96, 36, 32), {"columns": True}),
    "whole": (Grid(8, 50, 41, 16), {}),
}


def ternary(rng: np.random.Generator, grid: Grid, offset: Any) -> TernaryAdapter:
    a, b = (random_ternary(rng, *shape).astype(np.float32) for shape in ((grid.n_in, RANK), (RANK, grid.n_out)))
    surrogate: Any = "straight" if offset == "reference" else "window"
    omega = jnp.float32(1.0)
    return TernaryAdapter(jnp.asarray(a), jnp.asarray(b), omega, offset, jnp.dtype(jnp.float32), surrogate=surrogate)


def low_rank(rng: np.random.Generator, grid: Grid) -> GroupLowRank:
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((grid.groups, RANK), (RANK, grid.n_out)))
    return GroupLowRank(jnp.asarray(a), jnp.asarray(b), 2.0 * RANK, "mean", jnp.dtype(jnp.float32))


ADAPTERS: dict[str, Any] = {
    "none": lambda rng, grid: None,
    "ternary": lambda rng, grid: ternary(rng, grid, "none"),
    "ternary with offset": lambda rng, grid: ternary(rng, grid, "reference"),
    "qa-lora": low_rank,
}


def placed(w: QuantizedWeight, adapter: WeightAdapter | None, where: MatrixSharding) -> tuple[Any, Any]:
    if adapter is None:
        return jax.device_put(w, shardings(weight_specs(w, where), where.mesh)), None
    return jax.device_put((w, adapter), shardings((weight_specs(w, where), adapter_specs(adapter, where)), where.mesh))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("case", GRIDS)
def test_products_and_gradients_are_those_of_one_device(case: str, kind: str) -> None:
    grid, flags = GRIDS[case]
    rng = np.random.default_rng(0)
    w, adapter = quantized(random_numbers(rng, grid), grid), ADAPTERS[kind](rng, grid)
    x, dy = (jnp.asarray(rng.normal(size=(8, 3, n)), jnp.float32) for n in (grid.n_in, grid.n_out))

    def pulled(x: jax.Array, w: QuantizedWeight, adapter: Any, dy: jax.Array, where: MatrixSharding | None) -> Any:
        y, pull = jax.vjp(lambda x, adapter: quantized_linear(x, w, adapter, sharding=where), x, adapter)
        return y, *pull(dy)

    run = jax.jit(pulled, static_argnums=4)
    where = MatrixSharding(make_mesh(2, 2, 2), **flags)
    want, found = run(x, w, adapter, dy, None), run(x, *placed(w, adapter, where), dy, where)
    # Sums over rows and parts have another order, no more.
    for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5 * float(jnp.abs(one).max() + 1e-3))
    if adapter is not None:
        wanted = shardings(adapter_specs(adapter, where), where.mesh)
        for name in ("a", "b"):
            gradient = getattr(found[2], name)
            assert gradient.sharding.is_equivalent_to(getattr(wanted, name), gradient.ndim), "each keeps its part"


@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.parametrize("offset", ["none", "reference"])
def test_merged_words_and_offsets_are_those_of_one_device_to_the_bit(case: str, offset: str) -> None:
    grid, flags = GRIDS[case]
    rng = np.random.default_rng(1)
    w, adapter = quantized(random_numbers(rng, grid), grid), ternary(rng, grid, offset)
    adapter = dataclasses.replace(adapter, a=adapter.a.astype(jnp.int8), b=adapter.b.astype(jnp.int8))
    want = jax.jit(merge_adapter)(w, adapter)
    where = MatrixSharding(make_mesh(1, 4, 2), **flags)

    def merged(words: jax.Array, rest: QuantizedWeight, adapter: TernaryAdapter) -> Any:
        def one(words: jax.Array, rest: QuantizedWeight, adapter: TernaryAdapter) -> Any:
            found = merge_adapter(dataclasses.replace(rest, qweight=words), adapter)
            return found.qweight, found.offset

        return jax.vmap(one)(words, rest, adapter)

    nothing: Any = None
    stack = jax.tree.map(lambda leaf: leaf[None], (w, adapter))
    specs = weight_specs(stack[0], where, 1), adapter_specs(stack[1], where, 1)
    weights, adapters = jax.device_put(stack, shardings(specs, where.mesh))
    rest = dataclasses.replace(weights, qweight=nothing)
    run = jax.jit(lambda *arrays: merge_stack(*arrays, where, merged, ("words", "groups")))
    words, mu = run(weights.qweight, rest, adapters)
    np.testing.assert_array_equal(words[0], want.qweight)
    assert words.sharding.is_equivalent_to(weights.qweight.sharding, words.ndim)
    if offset == "none":
        assert mu is None
    else:
        assert want.offset is not None
        np.testing.assert_array_equal(np.asarray(mu[0]).view(np.uint32), np.asarray(want.offset).view(np.uint32))


def test_rows_that_cannot_be_cut_are_computed_everywhere_but_not_trained_on() -> None:
    grid, flags = GRIDS["columns"]
    rng = np.random.default_rng(2)
    w, adapter = quantized(random_numbers(rng, grid), grid), ternary(rng, grid, "none")
    where = MatrixSharding(make_mesh(2, 2, 2), **flags)
    x = jnp.asarray(rng.normal(size=(3, grid.n_in)), jnp.float32)
    w, adapter = placed(w, adapter, where)
    y = jax.jit(lambda x: quantized_linear(x, w, adapter, sharding=where))(x)
    want = np.asarray(x) @ np.asarray(jax.jit(merge_adapter)(w, adapter).dequantize())
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="a batch of 3 rows cannot be cut into 4 equal parts"):
        jax.grad(lambda a: quantized_linear(x, w, dataclasses.replace(adapter, a=a), sharding=where).sum())(adapter.a)
