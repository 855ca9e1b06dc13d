"""Eight simulated devices, which have to be asked for before JAX starts: `make test` does."""

from __future__ import annotations

import jax
import pytest

ASK = "XLA_FLAGS=--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="package", autouse=True)
def _eight_devices() -> None:
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, found {jax.device_count()}: run with {ASK}")
