"""The quantised linear layer: y = x @ W', its gradients, and the same bits from adapters and from merged words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels import (
    TernaryAdapter,
    keep_products,
    quantized_linear,
    weight_matrix,
)
from lotaqaf_jax.kernels.choose import choose
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.ternary import adjusted_weight, merge
from tests.weights import GRIDS, Grid, quantized, random_numbers, random_ternary

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("layer_*.npz"))

jit_linear = jax.jit(quantized_linear)


@jax.jit
def merged_weight(w: QuantizedWeight, adapter: TernaryAdapter) -> QuantizedWeight:
    rule = {"omega": adapter.omega, "offset": adapter.offset, "offset_dtype": adapter.offset_dtype}
    return merge(w, adapter.a, adapter.b, **rule)


@jax.jit
def pulled_back(x: jax.Array, w: QuantizedWeight, adapter: TernaryAdapter, dy: jax.Array) -> Any:
    """y, and the gradients of x and the adapters."""
    y, pull = jax.vjp(lambda x, adapter: quantized_linear(x, w, adapter), x, adapter)
    return y, *pull(dy)


def case(
    seed: int, grid: Grid, rank: int, omega: float, offset: Any, dtype: Any = jnp.float32, kind: Any = np.int8
) -> tuple[QuantizedWeight, TernaryAdapter]:
    rng = np.random.default_rng(seed)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = (random_ternary(rng, *shape).astype(kind) for shape in ((grid.n_in, rank), (rank, grid.n_out)))
    return w, TernaryAdapter(jnp.asarray(a), jnp.asarray(b), omega, offset, jnp.dtype(dtype))


def rows(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_authors_values(path: Path) -> None:
    z = np.load(path)
    w = QuantizedWeight.from_gptq(
        z["qweight"],
        z["qzeros_unshifted"],
        z["scales"],
        z["g_idx"],
        bits=int(z["bits"]),
        group_size=int(z["group_size"]),
        checkpoint_format="gptq_v2",
    )
    a, b = jnp.asarray(z["A"], jnp.float32), jnp.asarray(z["B"], jnp.float32)
    adapter = TernaryAdapter(a, b, float(z["omega"]), "reference", jnp.float32)
    y, dx, dadapter = pulled_back(z["x"], w, adapter, z["gy"])
    for found, name in ((y, "y"), (dx, "grad_x"), (dadapter.a, "grad_A"), (dadapter.b, "grad_B")):
        assert np.abs(found - z[name]).max() <= 1e-5 * np.abs(z[name]).max(), name


# (grid, rank, omega, offset, storage type of mu, type of x)
EQUAL = (
    (GRIDS[0], 8, 5.0, "reference", jnp.float32, jnp.float32),
    (GRIDS[1], 5, 1.7, "paper", jnp.float32, jnp.float32),
    (GRIDS[1], 6, 2.5, "reference", jnp.bfloat16, jnp.bfloat16),
    (GRIDS[3], 12, 3.3, "reference", jnp.float16, jnp.float32),
    (GRIDS[4], 8, 3.0, "none", jnp.float32, jnp.bfloat16),
)


@pytest.mark.parametrize(("grid", "rank", "omega", "offset", "dtype", "x_dtype"), EQUAL)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_merged_layer_gives_the_adapted_layers_output_bit_for_bit(
    grid: Grid, rank: int, omega: float, offset: Any, dtype: Any, x_dtype: Any, seed: int
) -> None:
    w, adapter = case(seed, grid, rank, omega, offset, dtype)
    x = rows(seed, 3, 5, grid.n_in, dtype=x_dtype)
    y = jit_linear(x, w, adapter)
    assert (y.shape, y.dtype) == ((3, 5, grid.n_out), x_dtype)
    np.testing.assert_array_equal(jit_linear(x, merged_weight(w, adapter)), y)


def test_outside_of_jit_merging_changes_nothing_either() -> None:
    w, adapter = case(0, GRIDS[1], 6, 2.6, "reference")
    x = rows(0, 4, GRIDS[1].n_in)
    np.testing.assert_array_equal(quantized_linear(x, merged_weight(w, adapter)), quantized_linear(x, w, adapter))


def test_many_rows_and_a_single_one() -> None:
    """Matrix products of other sizes are compiled in other ways; the bits still agree."""
    w, adapter = case(0, Grid(4, 256, 128, 64), 16, 5.3, "reference")
    merged = merged_weight(w, adapter)
    for count in (1, 200):
        x = rows(count, count, 256)
        np.testing.assert_array_equal(jit_linear(x, merged), jit_linear(x, w, adapter))


@pytest.mark.parametrize(
    ("offset", "surrogate"), [("reference", "straight"), ("paper", "window"), ("none", "straight"), ("none", "window")]
)
def test_gradients_are_those_of_the_matrix_product_with_the_adjusted_weight(offset: Any, surrogate: Any) -> None:
    w, adapter = case(1, GRIDS[3], 8, 2.5, offset, kind=np.float32)
    adapter = dataclasses.replace(adapter, surrogate=surrogate)
    x, dy = rows(2, 2, 3, 64), rows(3, 2, 3, 16)
    y, dx, dadapter = pulled_back(x, w, adapter, dy)

    def plain(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return x @ adjusted_weight(w, a, b, omega=2.5, offset=offset, surrogate=surrogate)

    @jax.jit
    def truths() -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(plain, x, adapter.a, adapter.b)
        return y, *pull(dy)

    expected, *gradients = truths()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for found, truth in zip((dx, dadapter.a, dadapter.b), gradients, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5)
    assert np.abs(dadapter.a).max() > 0


def test_types_of_gradients_follow_their_arguments() -> None:
    w, adapter = case(1, GRIDS[0], 8, 2.5, "reference", kind=jnp.bfloat16)
    x, dy = rows(2, 3, 64, dtype=jnp.bfloat16), rows(3, 3, 16, dtype=jnp.bfloat16)
    y, dx, dadapter = pulled_back(x, w, adapter, dy)
    assert {y.dtype, dx.dtype, dadapter.a.dtype, dadapter.b.dtype} == {jnp.dtype(jnp.bfloat16)}


def test_int8_and_float_adapters_give_equal_outputs_and_gradients_of_x() -> None:
    x, dy = rows(2, 3, 64), rows(3, 3, 16)
    results = []
    for kind in (np.int8, np.float32):
        w, adapter = case(1, GRIDS[0], 8, 2.5, "reference", kind=kind)
        results.append(pulled_back(x, w, adapter, dy)[:2])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_without_adapters_it_is_the_dequantised_product() -> None:
    w, _ = case(1, GRIDS[4], 8, 2.5, "none")
    x = rows(2, 3, GRIDS[4].n_in)
    np.testing.assert_allclose(jit_linear(x, w), x @ w.dequantize(), rtol=1e-6, atol=1e-5)
    dx = jax.grad(lambda x: quantized_linear(x, w).sum())(x)
    np.testing.assert_allclose(dx, jnp.ones((3, 8)) @ w.dequantize().T, rtol=1e-5, atol=1e-5)


def test_the_matrix_is_rounded_once() -> None:
    w, adapter = case(1, GRIDS[0], 8, 2.5, "reference")
    matrix = jax.jit(weight_matrix, static_argnums=2)
    wide = matrix(w, adapter, jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = matrix(w, adapter, dtype)
        assert narrow.dtype == dtype
        np.testing.assert_array_equal(narrow, wide.astype(dtype))


def test_the_backward_pass_keeps_no_dequantised_weight() -> None:
    """What the forward pass saves for the backward pass: x, words and adapters, no float matrix of the weight."""
    w, adapter = case(0, Grid(4, 256, 192, 64), 8, 5, "reference", kind=np.float32)
    x = rows(0, 2, 256)
    plain = lambda x, adapter: quantized_linear(x, w, adapter)  # noqa: E731
    for layer in (plain, jax.checkpoint(plain, policy=keep_products)):
        pull = jax.eval_shape(lambda *given, layer=layer: jax.vjp(layer, *given)[1], x, adapter)
        saved = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]
        assert saved, "nothing was saved: this test would prove nothing"
        assert max(leaf.size for leaf in saved) < 256 * 192 / 4


def test_adapters_are_a_pytree_with_their_rule_in_the_structure() -> None:
    _, adapter = case(0, GRIDS[0], 8, 5, "paper", jnp.bfloat16)
    assert [jnp.shape(leaf) for leaf in jax.tree.leaves(adapter)] == [(64, 8), (8, 16), ()]
    assert adapter.rank == 8
    back = jax.jit(lambda x: x)(adapter)
    assert (back.omega, back.offset, back.offset_dtype) == (5, "paper", jnp.bfloat16)


def test_implementations_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose() == choose("xla") == "xla"
    monkeypatch.setenv("LOTAQAF_KERNELS", "xla")
    assert choose() == "xla"
    monkeypatch.setenv("LOTAQAF_KERNELS", "cuda")
    assert choose("xla") == "xla"
    with pytest.raises(ConfigError, match="LOTAQAF_KERNELS: found 'cuda', expected one of"):
        choose()
    monkeypatch.setenv("LOTAQAF_KERNELS", "")
    w, adapter = case(0, GRIDS[0], 8, 5, "paper")
    with pytest.raises(ConfigError, match="implementation: found 'cuda', expected one of"):
        quantized_linear(rows(0, 2, 64), w, adapter, implementation="cuda")


@pytest.mark.parametrize("omega", [0.0, 8.0, float("nan")])
def test_settings_out_of_range_are_refused_here_too(omega: float) -> None:
    w, adapter = case(0, GRIDS[0], 8, omega, "paper")
    with pytest.raises(ConfigError, match="omega: found"):
        quantized_linear(rows(0, 2, 64), w, adapter)
