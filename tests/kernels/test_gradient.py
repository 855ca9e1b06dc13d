"""The gradient of D from the gradient of the weight: the fused kernel against the plain formula."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.ternary import step_gradient
from tests.weights import Grid, quantized, random_numbers

pytest.importorskip("triton")
pytest.importorskip("torch")


@pytest.mark.parametrize("offset", ["reference", "none"])
@pytest.mark.parametrize("grid", [Grid(4, 200, 70, 64), Grid(4, 256, 48, 128), Grid(3, 100, 33, 32)], ids=str)
def test_the_kernel_follows_the_formula(grid: Grid, offset: Any) -> None:
    from lotaqaf_jax.kernels.gradient import gpu

    rng = np.random.default_rng(0)
    w = quantized(random_numbers(rng, grid), grid)
    dweight = jnp.asarray(rng.normal(size=(grid.n_in, grid.n_out)), jnp.float32)
    assert gpu.fits_tiles(w)
    truth = step_gradient(w, dweight, omega=4.3, offset=offset)
    found = gpu.step_gradient(w, dweight, omega=4.3, offset=offset)
    assert np.abs(found - truth).max() <= 1e-6 * np.abs(truth).max()


def test_groups_that_no_tile_holds_are_left_to_the_plain_formula() -> None:
    from lotaqaf_jax.kernels.gradient import gpu

    for grid in (Grid(4, 64, 16, -1), Grid(4, 96, 16, 48), Grid(4, 64, 16, 32, act_order=True)):
        assert not gpu.fits_tiles(quantized(random_numbers(np.random.default_rng(0), grid), grid))
