"""The product of float8 numbers that may stand for the gradient of a weight."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lotaqaf_jax.kernels import quantized_linear
from lotaqaf_jax.kernels.float8.product import float8_weight_gradient, quantized_columns
from tests.kernels.test_linear import case
from tests.weights import Grid

pytest.importorskip("triton")
pytest.importorskip("torch")

TYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def numbers(seed: int, *shape: int, spread: float = 1.0) -> np.ndarray:
    """Normal, each row of another magnitude, as gradients of tokens are."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * np.exp(spread * rng.normal(size=(shape[0], 1)))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("magnitude", [1.0, 1e-7, 3e4])
def test_columns_are_scaled_into_the_range_of_the_type(implementation: str, kind: str, magnitude: float) -> None:
    dtype = TYPES[kind]
    x = jnp.asarray(magnitude * numbers(0, 70, 33), jnp.bfloat16)
    found, scale = quantized_columns(x, dtype, implementation)
    assert found.shape == (33, 70)
    assert found.dtype == dtype
    top = float(ml_dtypes.finfo(dtype).max)
    largest = np.abs(np.asarray(x, np.float64)).max() * float(scale)
    assert top / 2 < largest <= top, "the largest power of two that fits"
    assert np.log2(float(scale)) == round(np.log2(float(scale)))
    exact = np.asarray(x, np.float64).T * float(scale)
    found = np.asarray(found, np.float64)
    if implementation == "xla":
        unit, smallest = 2.0 ** -ml_dtypes.finfo(dtype).nmant, float(ml_dtypes.finfo(dtype).smallest_subnormal)
        assert (np.abs(found - exact) <= (unit * np.abs(exact) + smallest) / 2).all()
    else:
        # Triton's interpreter does not round as a card does; that the card rounds to nearest is seen on one.
        assert np.linalg.norm(found - exact) <= 0.2 * np.linalg.norm(exact)


def test_the_product_is_that_of_the_rounded_numbers() -> None:
    x, dy = jnp.asarray(numbers(1, 96, 40), jnp.bfloat16), jnp.asarray(1e-5 * numbers(2, 96, 24), jnp.bfloat16)
    product, factor = float8_weight_gradient(x, dy, "xla")
    assert product.dtype == jnp.bfloat16
    (left, s), (right, t) = quantized_columns(x, TYPES["e4m3"], "xla"), quantized_columns(dy, TYPES["e5m2"], "xla")
    truth = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T / (float(s) * float(t))
    found = np.asarray(product, np.float64) * float(factor)
    assert np.linalg.norm(found - truth) <= 3e-3 * np.linalg.norm(truth)
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    assert 1e-3 * np.linalg.norm(exact) < np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(implementation: str, bad: float) -> None:
    x = jnp.ones((64, 16), jnp.bfloat16).at[5, 3].set(bad)
    product, factor = float8_weight_gradient(x, jnp.ones((64, 8), jnp.bfloat16), implementation)
    assert not np.isfinite(np.asarray(product * factor, np.float32)).all()


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_zeros_give_zeros(implementation: str) -> None:
    x = jnp.zeros((64, 16), jnp.bfloat16)
    product, factor = float8_weight_gradient(x, jnp.zeros((64, 8), jnp.bfloat16), implementation)
    assert not np.asarray(product * factor, np.float32).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_only_the_adapters_gradients_of_bfloat16_layers_change(dtype: Any) -> None:
    w, adapter = case(3, Grid(4, 128, 64, 64), 16, 4.0, "reference", kind=np.float32)
    x, dy = jnp.asarray(numbers(4, 256, 128), dtype), jnp.asarray(numbers(5, 256, 64), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(float8: bool) -> Any:
        t = dataclasses.replace(adapter, float8=float8)
        y, pull = jax.vjp(lambda x, t: quantized_linear(x, w, t), x, t)
        return y, *pull(dy)

    (y, dx, exact), (y8, dx8, rounded) = pulled(False), pulled(True)
    assert np.array_equal(y, y8)
    assert np.array_equal(dx, dx8)
    for one, other in ((exact.a, rounded.a), (exact.b, rounded.b)):
        error = np.linalg.norm(one - other) / np.linalg.norm(one)
        assert (0 < error < 0.06) if dtype == jnp.bfloat16 else (error == 0)
