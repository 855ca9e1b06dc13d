"""What is compiled: a cache on disk, the step, and the way of recomputing that fits the memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from lotaqaf_jax.models import Recompute

__all__ = ["CompiledStep", "least_recompute", "use_compilation_cache"]


class _Measured(Protocol):
    def memory_analysis(self) -> Any: ...


Step = TypeVar("Step", bound=_Measured)


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
    compile_step: Callable[[Recompute], Step], ways: Sequence[Recompute] = ("products",), *, share: float = 0.92
) -> tuple[Recompute, Step]:
    """The first of ``ways`` whose compiled step fits the first device's memory, or "block"; and the compiled step.

    Args:
        compile_step: compiles the training step for one way of recomputing; the result has jax's ``memory_analysis()``.
        ways: those to try before "block", the fastest first. A device that tells no limit gets "block" at once.
        share: of the memory that may be used; the rest is for fragments and for what the step does not know of.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None
    if limit is None:
        return "block", compile_step("block")
    for way in ways:
        try:
            step = compile_step(way)
        except jax.errors.JaxRuntimeError:  # The compiler itself may find that it does not fit.
            continue
        found = step.memory_analysis()
        if found.argument_size_in_bytes + found.temp_size_in_bytes <= share * limit:
            return way, step
        del step  # Two programs need not be held at once.
    return "block", compile_step("block")


class CompiledStep:
    """A jitted training step, compiled once, for batches of one shape.

    A batch with the shapes and types of the one it was compiled for goes to that program. Any other goes to the jitted
    function, which compiles for it when it first sees it.
    """

    def __init__(self, jitted: Any, state: Any, frozen: Any, batch: Any) -> None:
        """Compile.

        Args:
            jitted: (state, frozen, batch) -> anything, of :func:`jax.jit`.
            state: arguments of the shapes, types and placement that the step will be called with.
            frozen: the same.
            batch: the same; NumPy arrays will do.
        """
        self._jitted = jitted
        self._shapes = _shapes(batch)
        self._program = jitted.lower(state, frozen, batch).compile()

    def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
        """Queue the step on the device."""
        step = self._program if _shapes(batch) == self._shapes else self._jitted
        return step(state, frozen, batch)

    def memory_analysis(self) -> Any:
        """The compiler's count of memory, see ``jax.stages.Compiled.memory_analysis``."""
        return self._program.memory_analysis()


def _shapes(batch: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {name: (array.shape, array.dtype) for name, array in batch.items()}
