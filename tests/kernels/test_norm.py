"""The residual sum and its norm: every implementation against float64, and against the operations one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lotaqaf_jax.kernels.matmul.gpu as matmul
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels import choose
from lotaqaf_jax.kernels.matmul import packed_matmul_many
from lotaqaf_jax.kernels.matmul.blocks import matmul_blocks
from lotaqaf_jax.kernels.norm import add_norm, gpu, rms_norm
from tests.kernels.implementations import IMPLEMENTATIONS
from tests.models.tiny import CONFIG, quantized_decoder, tokens
from tests.weights import Grid, quantized, random_numbers

EPS = 1e-6
LAYERS = 3
HALVES = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}  # half a unit in the last place, relative
TYPES = pytest.mark.parametrize("dtype", list(HALVES), ids=["bfloat16", "float16"])


def numbers(seed: int, *shape: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def example(seed: int, rows: tuple[int, ...], size: int, parts: int, dtype: Any) -> tuple[jax.Array, ...]:
    """x, an update in so many parts (0: whole), and the weights of three layers."""
    x = numbers(seed, *rows, size, dtype=dtype)
    update = numbers(seed + 1, *rows, size, dtype=dtype)
    if parts:
        update = numbers(seed + 1, parts, *rows, size, dtype=jnp.float32)
    return x, update, numbers(seed + 2, LAYERS, size, dtype=jnp.float16)


def in_two_parts(*shape: Any) -> Any:
    """The blocks of a packed matmul whose programs share k in pairs."""
    blocks = matmul_blocks(*shape)
    return blocks and dataclasses.replace(blocks, split=2)


def one_by_one(x: jax.Array, update: jax.Array) -> jax.Array:
    """x + update, the parts added in order and rounded once."""
    if update.ndim > x.ndim:
        total = np.zeros(x.shape, np.float32)
        for part in np.asarray(update):
            total = total + part
        update = jnp.asarray(total).astype(x.dtype)
    # Of two 16-bit numbers the float32 sum is exact enough to round twice.
    return (x.astype(jnp.float32) + update.astype(jnp.float32)).astype(x.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@TYPES
@settings(max_examples=8, deadline=None)
@given(
    # Few, as the operations of plain JAX are compiled for each: one row and several, one part of a row and several.
    rows=st.sampled_from([(1,), (2, 3)]),
    size=st.sampled_from([1, 77, 1024, 1100]),
    parts=st.sampled_from([0, 1, 5]),
    layer=st.integers(0, LAYERS),
    seed=st.integers(0, 99),
)
def test_sum_is_exact_and_norm_is_rounded_as_float64_would_be(
    implementation: str, dtype: Any, rows: tuple[int, ...], size: int, parts: int, layer: int, seed: int
) -> None:
    x, update, weights = example(seed, rows, size, parts, dtype)
    total, y = add_norm(x, update, weights, EPS, jnp.int32(layer), implementation=implementation)
    assert total.dtype == y.dtype == dtype
    assert total.shape == y.shape == x.shape
    np.testing.assert_array_equal(total, one_by_one(x, update))
    wide = np.asarray(total, np.float64)
    weight = np.asarray(weights[min(layer, LAYERS - 1)].astype(dtype), np.float64)
    exact = weight * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS)
    # Rounded twice, and what is below float16's normal numbers to a fixed step.
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= 2.01 * HALVES[dtype] * np.abs(exact) + 1e-6)


@TYPES
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_rounding_in_the_mean_it_is_plain_jax_bit_for_bit(implementation: str, dtype: Any) -> None:
    """Small whole numbers have the same mean square in any order."""
    rng = np.random.default_rng(0)
    x, update = (jnp.asarray(rng.integers(-3, 4, (4, 256)), dtype) for _ in range(2))
    weight = numbers(1, 1, 256, dtype=dtype)
    total, y = jax.jit(lambda *a: add_norm(*a, EPS, 0, implementation=implementation))(x, update, weight)
    np.testing.assert_array_equal(total, x + update)
    np.testing.assert_array_equal(y, rms_norm(x + update, weight[0], EPS))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parts_of_a_product_give_what_the_whole_product_gives(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "matmul_blocks", in_two_parts)
    grid = Grid(4, 256, 64, 32)
    w = quantized(random_numbers(np.random.default_rng(0), grid), grid)
    x, stream = numbers(1, 3, 256, dtype=jnp.bfloat16), numbers(2, 3, 64, dtype=jnp.bfloat16)
    whole, parts = (
        packed_matmul_many(x, (w,), whole=whole, implementation=implementation)[0] for whole in (True, False)
    )
    assert whole.shape == (3, 64)
    assert parts.shape == ((2, 3, 64) if implementation == "triton" else (3, 64))
    weights = numbers(3, 1, 64, dtype=jnp.bfloat16)
    for one, other in zip(*(add_norm(stream, y, weights, EPS, 0) for y in (whole, parts)), strict=True):
        np.testing.assert_array_equal(one, other)
    bias = numbers(4, 64, dtype=jnp.bfloat16)
    biased = (packed_matmul_many(x, (w,), (bias,), whole=w_, implementation=implementation)[0] for w_ in (True, False))
    np.testing.assert_array_equal(*biased)


def test_decoding_hands_parts_to_the_norm_and_gives_what_plain_jax_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    model = quantized_decoder(dataclasses.replace(CONFIG, num_hidden_layers=2), dtype=jnp.float16)
    model.segments[0].self_attn.o_proj.bias = nnx.Param(numbers(0, 2, 32, dtype=jnp.float16))
    position, valid = jnp.ones((2, 1), jnp.int32), jnp.ones((2, 4), bool)

    def decode() -> jax.Array:
        # A lambda of its own: what was traced with another choice is not to be found again.
        return jax.jit(lambda: model.cached_hidden_states(tokens(2, 1), position, model.empty_cache(2, 4), 1, valid))()[
            0
        ]

    plain = decode()
    parts: list[int] = []

    def record(x: jax.Array, update: jax.Array, *rest: Any) -> Any:
        parts.append(update.shape[0] if update.ndim > x.ndim else 0)
        return kernel(x, update, *rest)

    kernel = gpu.add_norm
    monkeypatch.setattr(gpu, "add_norm", record)
    monkeypatch.setattr(choose, "_default", lambda _: "triton")
    monkeypatch.setattr(matmul, "matmul_blocks", in_two_parts)
    found = decode()
    assert parts == [0, 2]  # of o_proj, which has a bias, and of down_proj, in a loop that is traced once
    np.testing.assert_allclose(found, plain, atol=2e-2)
    assert float(jnp.abs(plain).mean()) > 0.5


def test_the_kernel_takes_few_rows_of_16_bits() -> None:
    def fits(rows: int, size: int, dtype: Any) -> bool:
        return gpu.fits(jax.ShapeDtypeStruct((rows, size), dtype))  # type: ignore[arg-type]

    assert fits(128, 16384, jnp.bfloat16)
    assert not fits(129, 64, jnp.bfloat16)
    assert not fits(1, 16385, jnp.float16)
    assert not fits(1, 64, jnp.float32)


@pytest.mark.parametrize("layer", [None, 0])
def test_others_are_left_to_plain_jax(layer: int | None) -> None:
    x, update, weights = example(0, (2,), 24, 0, jnp.float32)
    weight = weights if layer is not None else weights[0]
    for one, other in zip(
        *(add_norm(x, update, weight, EPS, layer, implementation=i) for i in ("xla", "triton")), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("update", "weight", "layer"),
    [((2, 9), (8,), None), ((2, 3, 2, 8), (8,), None), ((3, 8), (8,), None), ((2, 8), (3, 8), None), ((2, 8), (8,), 0)],
)
def test_shapes_that_do_not_fit_are_named(update: tuple[int, ...], weight: tuple[int, ...], layer: int | None) -> None:
    with pytest.raises(ConfigError, match=r"add_norm: x has shape \(2, 8\), update"):
        add_norm(jnp.zeros((2, 8)), jnp.zeros(update), jnp.zeros(weight), EPS, layer)
