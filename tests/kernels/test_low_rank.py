"""The weight with QA-LoRA's adapters: all implementations give the bits of the merged weight."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.kernels import GroupLowRank, merge_adapter, quantized_linear, weight_matrix
from tests.kernels.implementations import IMPLEMENTATIONS
from tests.weights import Grid, quantized, random_numbers

GRIDS = (Grid(4, 64, 32, 32), Grid(3, 64, 32, 32), Grid(4, 64, 16, 16, act_order=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weight_is_that_of_the_merge(grid: Grid, implementation: Any) -> None:
    rng = np.random.default_rng(0)
    w = quantized(random_numbers(rng, grid), grid)
    a, b = rng.normal(size=(grid.groups, 5)), 0.1 * rng.normal(size=(5, grid.n_out))
    t = GroupLowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 10.0, "sum", jnp.dtype(jnp.bfloat16))
    merged = merge_adapter(w, t, implementation)
    found = weight_matrix(w, t, jnp.float32, implementation)
    assert not np.array_equal(found, w.dequantize())
    np.testing.assert_array_equal(found, merged.dequantize())
    x = jnp.asarray(rng.normal(size=(3, grid.n_in)), jnp.float32)
    ours, theirs = (quantized_linear(x, *pair, implementation=implementation) for pair in ((w, t), (merged, None)))
    np.testing.assert_array_equal(ours, theirs)
