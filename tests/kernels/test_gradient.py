"""The adapters' gradients from the gradient of the weight: the fused kernels against the plain formula."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.ternary import adapter_gradients
from tests.weights import Grid, quantized, random_numbers, random_ternary

pytest.importorskip("triton")
pytest.importorskip("torch")

# Rest rows and columns, groups within a tile, whole tiles of groups, several tiles to a group, one group.
GRIDS = (Grid(4, 200, 70, 64), Grid(4, 256, 48, 128), Grid(3, 100, 33, 32), Grid(8, 72, 16, 16), Grid(2, 150, 24, -1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("offset", "surrogate"),
    [("reference", "straight"), ("paper", "straight"), ("none", "straight"), ("none", "window"), ("paper", "window")],
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_kernels_follow_the_formula(grid: Grid, offset: Any, surrogate: Any, dtype: Any) -> None:
    from lotaqaf_jax.kernels.gradient import gpu

    rng = np.random.default_rng(0)
    w = quantized(random_numbers(rng, grid), grid)
    rank = 12
    a, b = (jnp.asarray(random_ternary(rng, *shape)) for shape in ((grid.n_in, rank), (rank, grid.n_out)))
    dweight = jnp.asarray(rng.normal(size=(grid.n_in, grid.n_out)), dtype)
    assert gpu.fits_tiles(w)
    # The truth for 16 bits is that of the same numbers in float32; what is rounded to 16 bits is S or D's gradient.
    rule: Any = {"omega": 4.3, "offset": offset, "surrogate": surrogate}
    truth = adapter_gradients(w, a, b, dweight.astype(jnp.float32), **rule)
    found = gpu.adapter_gradients(w, a, b, dweight, **rule)
    for one, true in zip(found, truth, strict=True):
        assert one.dtype == jnp.float32
        error = np.linalg.norm(one - true) / np.linalg.norm(true)
        assert error <= (2e-6 if dtype == jnp.float32 else 5e-3)


def test_the_offset_takes_part_in_the_gradient() -> None:
    from lotaqaf_jax.kernels.gradient import gpu

    grid = Grid(4, 128, 32, 64)
    rng = np.random.default_rng(1)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = (jnp.asarray(random_ternary(rng, *shape)) for shape in ((grid.n_in, 8), (8, grid.n_out)))
    # The same in all rows of a group, so that the mean is as large as it can be.
    dweight = jnp.asarray(np.repeat(rng.normal(size=(2, grid.n_out)), 64, axis=0), jnp.float32)
    with_offset, without = (gpu.adapter_gradients(w, a, b, dweight, omega=2.0, offset=o) for o in ("paper", "none"))
    for one, other in zip(with_offset, without, strict=True):
        assert np.linalg.norm(one - other) > 0.3 * np.linalg.norm(other)


def test_groups_that_no_tile_holds_are_left_to_the_plain_formula() -> None:
    from lotaqaf_jax.kernels.gradient import gpu

    for grid in (Grid(4, 96, 16, 48), Grid(4, 64, 16, 32, act_order=True)):
        assert not gpu.fits_tiles(quantized(random_numbers(np.random.default_rng(0), grid), grid))
