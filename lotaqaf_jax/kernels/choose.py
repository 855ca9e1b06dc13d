"""The one place that chooses an implementation of an operation."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal, get_args

import jax

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels.launch import interpreted

__all__ = ["ADA", "AMPERE", "HOPPER", "KERNELS", "Implementation", "choose", "compute_capability", "missing_for_triton"]

AMPERE = (8, 0)
ADA = (8, 9)
HOPPER = (9, 0)

KERNELS = "LOTAQAF_KERNELS"
"""Environment variable that says what None means, for whoever suspects a kernel: LOTAQAF_KERNELS=xla."""

Implementation = Literal["xla", "triton"]


def choose(implementation: str | None = None) -> Implementation:
    """Return the implementation to use.

    Args:
        implementation: "xla" is plain JAX and runs everywhere; "triton" are kernels for NVIDIA cards of compute
            capability 8.0 or more, or with TRITON_INTERPRET=1 for Triton's interpreter; None is what LOTAQAF_KERNELS
            says, without it "triton" where it runs, and "xla", with one warning on a GPU, where not.

    Raises:
        ConfigError: an unknown name, or "triton" without the packages it needs.
    """
    name = "implementation"
    if implementation is None:
        name, implementation = KERNELS, os.environ.get(KERNELS)
    if not implementation:
        return _default(jax.default_backend())
    if implementation not in get_args(Implementation):
        raise ConfigError(f"{name}: found {implementation!r}, expected one of {get_args(Implementation)}.")
    if implementation == "triton" and (missing := _missing_packages()):
        raise ConfigError(
            f"{name}: 'triton' needs {missing}; pip install 'lotaqaf_jax[gpu]', or leave {name} out to use what is "
            "there."
        )
    return implementation  # type: ignore[return-value]


@functools.cache
def _default(backend: str) -> Implementation:
    if backend != "gpu":
        return "xla"
    missing = missing_for_triton()
    if missing is None:
        return "triton"
    warnings.warn(
        f"The fused GPU kernels are not used, because {missing}. Results are right, training and generation slower.",
        stacklevel=3,
    )
    return "xla"


def missing_for_triton() -> str | None:
    """What keeps the Triton kernels from running on the first device, as the end of a sentence; None if nothing."""
    if packages := _missing_packages():
        return f"{packages} cannot be imported (pip install 'lotaqaf_jax[gpu]')"
    device = jax.local_devices()[0]
    capability = compute_capability()
    if capability is None:
        return f"the first device is {device.platform!r}, no NVIDIA card"
    if capability < AMPERE:
        return f"{device.device_kind} has compute capability {'.'.join(map(str, capability))} and they need 8.0"
    return None


def compute_capability() -> tuple[int, ...] | None:
    """(major, minor) of the first device, or None where it is no NVIDIA card."""
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None:
        return None
    return tuple(int(part) for part in str(capability).split("."))


def _missing_packages() -> str:
    # The interpreter calls Triton itself, and torch.
    needed = ("triton", "torch") if interpreted() else ("triton", "jax_triton")
    names = [name for name in needed if importlib.util.find_spec(name) is None]
    return " and ".join(names)
