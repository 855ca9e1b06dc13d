"""Gradients of the adapters from the gradient of the weight: the fused projections against the plain formula."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.ternary import adapter_gradients
from tests.weights import Grid, quantized, random_numbers, random_ternary

pytest.importorskip("triton")
pytest.importorskip("torch")


@pytest.mark.parametrize("offset", ["reference", "none"])
@pytest.mark.parametrize("grid", [Grid(4, 200, 70, 64), Grid(4, 256, 48, 128), Grid(3, 100, 33, 32)], ids=str)
def test_projections(grid: Grid, offset: Any) -> None:
    from lotaqaf_jax.kernels.project import gpu

    rng = np.random.default_rng(0)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = (jnp.asarray(random_ternary(rng, *shape)) for shape in ((grid.n_in, 24), (24, grid.n_out)))
    dweight = jnp.asarray(rng.normal(size=(grid.n_in, grid.n_out)), jnp.float32)
    assert gpu.fits_tiles(w)
    truth = adapter_gradients(w, a, b, dweight, omega=4.3, offset=offset)
    # Few programs, so that several tiles are summed by one and several parts are left to add.
    found = gpu.projected(w, a, b, dweight, omega=4.3, offset=offset, blocks=gpu.ProjectBlocks(programs=3))
    for ours, theirs in zip(found, truth, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_groups_that_no_tile_holds_are_left_to_the_plain_formula() -> None:
    from lotaqaf_jax.kernels.project import gpu

    for grid in (Grid(4, 64, 16, -1), Grid(4, 96, 16, 48), Grid(4, 64, 16, 32, act_order=True)):
        assert not gpu.fits_tiles(quantized(random_numbers(np.random.default_rng(0), grid), grid))
