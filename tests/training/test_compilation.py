"""The least recomputing that fits, and where compiled programs are kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lotaqaf_jax.training.compilation import CompiledStep, least_recompute, use_compilation_cache

GIB = 2**30


def card(gib: float) -> Any:
    return SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": gib * GIB})


def step_of(arguments: float, temporary: float) -> Any:
    sizes = SimpleNamespace(argument_size_in_bytes=arguments * GIB, temp_size_in_bytes=temporary * GIB)
    return SimpleNamespace(memory_analysis=lambda: sizes)


@pytest.mark.parametrize(("memory", "expected"), [(80, "products"), (46, "block"), (47.9, "products")])
def test_products_are_kept_where_they_fit_with_some_room(
    monkeypatch: pytest.MonkeyPatch, memory: float, expected: str
) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [card(memory)])
    steps = {"products": step_of(10, 34), "block": step_of(10, 5)}
    assert least_recompute(steps.__getitem__) == (expected, steps[expected])


def test_a_step_that_the_compiler_finds_too_large_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    block = step_of(10, 5)

    def too_large(way: str) -> Any:
        if way == "block":
            return block
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax, "local_devices", lambda: [card(80)])
    assert least_recompute(too_large) == ("block", block)


def test_a_device_without_a_limit_recomputes_blocks_and_compiles_nothing_else() -> None:
    compiled = {"block": step_of(10, 5)}
    assert least_recompute(compiled.__getitem__) == ("block", compiled["block"])


def test_a_step_is_compiled_once_and_again_only_for_other_shapes(caplog: pytest.LogCaptureFixture) -> None:
    def doubled(state: jax.Array, frozen: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state + 1, 2 * batch["x"].sum() + frozen

    def compilations() -> int:
        return sum("Finished XLA compilation of jit(doubled)" in message for message in caplog.messages)

    with jax.log_compiles():
        step = CompiledStep(jax.jit(doubled, donate_argnums=0), jnp.int32(0), jnp.int32(5), {"x": np.ones((2, 3))})
        state = jnp.int32(0)
        for _ in range(3):
            state, result = step(state, jnp.int32(5), {"x": jnp.ones((2, 3))})
        assert (int(state), int(result), compilations()) == (3, 17, 1)
        for _ in range(2):
            state, result = step(state, jnp.int32(5), {"x": jnp.ones((2, 4))})
        assert (int(state), int(result), compilations()) == (5, 21, 2)


def test_on_a_cpu_no_folder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    before = jax.config.jax_compilation_cache_dir
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == before


def test_on_a_gpu_the_folder_is_the_users_cache_unless_one_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert use_compilation_cache() == tmp_path / "lotaqaf_jax" / "compiled"
        assert use_compilation_cache() is None, "what is set stays"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
