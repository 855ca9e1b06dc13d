"""The one place that chooses an implementation of an operation."""

from __future__ import annotations

from typing import Literal, get_args

from lotaqaf_jax.errors import ConfigError

__all__ = ["Implementation", "choose"]

Implementation = Literal["xla"]


def choose(implementation: str | None = None) -> Implementation:
    """Return the implementation to use.

    Args:
        implementation: a name, or None for the best one that runs here. "xla" is plain JAX and runs everywhere.

    Raises:
        ConfigError: an unknown name.
    """
    if implementation is None:
        return "xla"
    if implementation not in get_args(Implementation):
        raise ConfigError(f"implementation: found {implementation!r}, expected one of {get_args(Implementation)}.")
    return implementation  # type: ignore[return-value]
