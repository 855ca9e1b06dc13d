"""How a kernel is handed to jax-triton, whose call changed with 0.4; a stand-in records what it is given."""

from __future__ import annotations

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lotaqaf_jax.kernels.launch import launch

SHAPES = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (1, 2, 3)]


def kernel() -> Any:
    """All that a launch reads of a kernel with an array, a number, three outputs and a constant."""
    names = ["x_ptr", "scale", "first_ptr", "second_ptr", "third_ptr", "SIZE"]
    return types.SimpleNamespace(arg_names=names, fn=types.SimpleNamespace(__name__="some_kernel"))


def install(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("jax_triton")
    module.triton_call = call  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def run(aliases: dict[int, int] | None, registers: int | None = None) -> list[jax.Array]:
    return launch(
        kernel(),
        jnp.zeros(2),
        0.5,
        out=SHAPES,
        grid=(1,),
        num_warps=4,
        num_stages=1,
        fuse=True,
        registers=registers,
        aliases=aliases,
        SIZE=2,
    )


def test_before_0_4_every_output_has_a_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    def triton_call(*args: Any, kernel: Any, out_shape: Any, **rest: Any) -> Any:
        assert rest["input_output_aliases"] == {0: 1}
        assert rest["enable_fp_fusion"] is True
        return [jnp.zeros(s.shape) for s in out_shape]

    install(triton_call, monkeypatch)
    assert [y.shape for y in run({0: 1}, registers=168)] == [(1,), (2,), (3,)]


def test_from_0_4_on_registers_can_be_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def triton_call(*args: Any, out_type: Any = None, backend_options: Any, **rest: Any) -> Any:
        assert backend_options == {"enable_fp_fusion": True, "maxnreg": 168}
        return [jnp.zeros(s.shape) for s in out_type]

    install(triton_call, monkeypatch)
    assert len(run(None, registers=168)) == 3


@pytest.mark.parametrize("aliases", [None, {0: 0}, {0: 1}, {0: 2}])
def test_from_0_4_on_outputs_without_a_pointer_come_last(
    aliases: dict[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def triton_call(*args: Any, kernel: Any, out_type: Any = None, **rest: Any) -> Any:
        assert rest["backend_options"] == {"enable_fp_fusion": True}
        shared = rest["input_output_aliases"]
        assert list(shared.values()) == ([2] if aliases else [])
        # The parameters of the others, in order, are those that were given nothing.
        left = [name for name in kernel.arg_names[2:5] if name not in rest]
        own = [out.shape[0] for i, out in enumerate(out_type) if i not in shared.values()]
        assert own == [{"first_ptr": 1, "second_ptr": 2, "third_ptr": 3}[name] for name in left]
        return [jnp.zeros(s.shape) for s in out_type]

    install(triton_call, monkeypatch)
    assert [y.shape for y in run(aliases)] == [(1,), (2,), (3,)]
