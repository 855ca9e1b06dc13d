"""What is compiled: a cache on disk, and the way of recomputing that fits the memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from lotaqaf_jax.models import Recompute

__all__ = ["least_recompute", "use_compilation_cache"]


def use_compilation_cache() -> Path | None:
    """On a GPU, keep compiled programs on disk, so that a second run starts in seconds.

    For a program's start, not for a library: the setting is JAX's own and holds for the whole process. What the user
    has set (JAX_COMPILATION_CACHE_DIR) stays. On a CPU nothing is kept, since programs for one machine's processor may
    not run on the next that shares the folder.

    Returns:
        The folder, or None where nothing was changed.
    """
    if jax.default_backend() != "gpu" or getattr(jax.config, "jax_compilation_cache_dir"):  # noqa: B009  (unknown to the type stubs)
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "lotaqaf_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def least_recompute(
    compile_step: Callable[[Recompute], Any], ways: Sequence[Recompute] = ("products",), *, share: float = 0.92
) -> Recompute:
    """The first of ``ways`` whose compiled step fits the first device's memory, or "block".

    Args:
        compile_step: compiles the training step for one way of recomputing.
        ways: those to try before "block", the fastest first.
        share: of the memory that may be used; the rest is for fragments and for what the step does not know of.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None
    if limit is None:
        return "block"
    for way in ways:
        try:
            found = compile_step(way).memory_analysis()
        except jax.errors.JaxRuntimeError:  # The compiler itself may find that it does not fit.
            continue
        if found.argument_size_in_bytes + found.temp_size_in_bytes <= share * limit:
            return way
    return "block"
