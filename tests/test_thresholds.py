"""omega from the share of entries of D = A @ B that pass it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.thresholds import check_share, omega_of_share, ramped_share
from tests.weights import random_ternary

omega_jitted = jax.jit(omega_of_share)


def brute_force(d: np.ndarray, share: float, rank: int) -> int:
    """The least whole number from 1 on that no more than ``share`` of |d| pass."""
    allowed = np.floor(np.float32(share) * np.float32(d.size))
    return next(omega for omega in range(1, rank) if (np.abs(d) > omega).sum() <= allowed or omega == rank - 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_it_is_the_least_number_that_no_more_pass(seed: int, share: float, density: float) -> None:
    rng = np.random.default_rng(seed)
    rank = 24
    a, b = random_ternary(rng, 40, rank), random_ternary(rng, rank, 30)
    b = b * (rng.random(b.shape) < density).astype(b.dtype)
    expected = brute_force(a.astype(int) @ b.astype(int), share, rank)
    assert omega_jitted(a, b, share) == expected


def test_wide_matrices_are_looked_at_in_columns_that_stand_for_all() -> None:
    rng = np.random.default_rng(0)
    a, b = random_ternary(rng, 64, 16), random_ternary(rng, 16, 5000)
    d = np.abs(a.astype(int) @ b.astype(int))
    omega = int(omega_of_share(a, b, 0.05))
    assert omega == brute_force(d[:, ::10], 0.05, 16)
    assert (d > omega).mean() < 0.06
    assert (d > omega - 1).mean() > 0.04


def test_every_matrix_of_a_stack_has_its_own() -> None:
    rng = np.random.default_rng(1)
    a = jnp.asarray(random_ternary(rng, 3, 40, 24))
    b = jnp.asarray(random_ternary(rng, 3, 24, 30)).at[1].set(0).at[2, ::2].set(0)
    omegas = omega_of_share(a, b, 0.04)
    assert omegas.tolist() == [float(omega_of_share(a[i], b[i], 0.04)) for i in range(3)]
    assert omegas[1] == 1, "nothing passes the least threshold"
    assert omegas[0] > omegas[2] > 1


def test_the_share_rises_over_the_first_three_tenths() -> None:
    steps = np.arange(1, 101)
    shares = np.asarray(ramped_share(0.04, steps, 100))
    np.testing.assert_allclose(shares[:30], 0.04 * steps[:30] / 30, rtol=1e-6)
    assert (shares[29:] == np.float32(0.04)).all()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="moved: found"):
        check_share(share)
