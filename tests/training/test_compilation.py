"""The least recomputing that fits, and where compiled programs are kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from lotaqaf_jax.training.compilation import least_recompute, use_compilation_cache

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
    assert least_recompute(lambda way: step_of(10, 34)) == expected


def test_a_step_that_the_compiler_finds_too_large_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(way: str) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax, "local_devices", lambda: [card(80)])
    assert least_recompute(too_large) == "block"


def test_a_device_without_a_limit_recomputes_blocks_and_compiles_nothing() -> None:
    def never(way: str) -> Any:
        raise AssertionError("compiled for nothing")

    assert least_recompute(never) == "block"


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
