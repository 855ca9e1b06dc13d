"""Launching a Triton kernel on JAX arrays: through jax-triton on a card, through Triton's interpreter on a CPU."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

__all__ = ["interpreted", "launch"]


# The interpreter replaces Triton's functions while it runs, and XLA calls back from several threads at once.
_INTERPRETER = threading.Lock()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def launch(
    kernel: Any,
    *inputs: jax.Array | int | float,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    fuse: bool = False,
    registers: int | None = None,
    aliases: dict[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Run ``kernel`` over ``grid`` and return its outputs.

    Args:
        kernel: a ``triton.jit`` function whose parameters are the inputs, one pointer for every output, and constants.
            It must not use the pointer of an output that shares an input's buffer: jax-triton passes none from 0.4 on.
            Where TRITON_INTERPRET=1 was set before it was imported, Triton's interpreter runs it, which needs torch.
        inputs: arrays (passed as pointers) and numbers.
        out: shapes and types of the outputs.
        grid: number of programs along each axis.
        num_warps: warps of a program.
        num_stages: depth of software pipelining.
        fuse: whether a product and a sum may be contracted into one operation that rounds once.
        registers: the most that a thread may take, or None for what the compiler likes; before jax-triton 0.4, always
            that.
        aliases: {input: output} that share a buffer; the inputs before it are arrays. An input must not be the slice of
            a stack that a loop goes over: XLA may then let the kernel read and write within the stacks (dynamic slice
            fusion, with jax-triton 0.4), and forgets there that the two are one.
        constants: the kernel's ``tl.constexpr`` parameters.
    """
    if interpreted():
        return _interpret(kernel, inputs, out, grid, aliases or {}, constants)
    # Imported here, because it changes the environment and is needed on a card alone.
    import jax_triton

    # A Python float would be passed in double precision.
    values = [np.float32(value) if isinstance(value, float) else value for value in inputs]
    call = functools.partial(
        jax_triton.triton_call,
        *values,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        name=kernel.fn.__name__,
        **_capability(),
        **constants,
    )
    if "out_type" not in inspect.signature(jax_triton.triton_call).parameters:  # before 0.4
        return call(out_shape=list(out), enable_fp_fusion=fuse, input_output_aliases=aliases)
    # Here a shared buffer has the input's pointer only, so the output's parameter is given a number nobody reads. The
    # buffers of all outputs are matched with the parameters that are left in order, so those without one come last.
    aliases = aliases or {}
    names = kernel.arg_names[len(values) : len(values) + len(out)]
    order = sorted(range(len(out)), key=lambda i: i in aliases.values())
    options: dict[str, Any] = {"enable_fp_fusion": fuse} | ({} if registers is None else {"maxnreg": registers})
    with warnings.catch_warnings():
        # Its replacement, a Ref, is no value that a custom_vjp or a scan could hand on.
        warnings.filterwarnings("ignore", message="input_output_aliases is deprecated", category=DeprecationWarning)
        results = call(
            out_type=[out[i] for i in order],
            backend_options=options,
            input_output_aliases={source: order.index(target) for source, target in aliases.items()},
            **{names[target]: 0 for target in aliases.values()},
        )
    return [results[order.index(i)] for i in range(len(out))]


def _capability() -> dict[str, int]:
    """Where no card is at hand, compile for Hopper: the caller lowers for a described machine."""
    return {} if jax.default_backend() == "gpu" else {"compute_capability": 90}


def _interpret(
    kernel: Any,
    inputs: Sequence[Any],
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    aliases: dict[int, int],
    constants: dict[str, Any],
) -> list[jax.Array]:
    arrays = [value for value in inputs if not isinstance(value, int | float)]

    def run(*concrete: Any) -> list[np.ndarray]:
        import torch

        def tensor(array: Any) -> Any:
            array = np.array(array)  # A copy: what JAX passes may not be written to.
            return torch.from_numpy(array.view(_bits(array.dtype))).view(getattr(torch, array.dtype.name))

        given = iter([tensor(array) for array in concrete])
        arguments = [value if isinstance(value, int | float) else next(given) for value in inputs]
        # Outputs start as garbage, as on a card, so that a kernel that leaves some out is found.
        outputs = [tensor(np.full(s.shape, 77).astype(s.dtype)) for s in out]
        for source, target in aliases.items():
            outputs[target] = arguments[source]
        with _INTERPRETER:
            kernel[grid](*arguments, *outputs, **constants)
        # By their bits, since numpy lacks some of the types.
        return [
            o.view(getattr(torch, _bits(s.dtype).name)).numpy().view(s.dtype) for o, s in zip(outputs, out, strict=True)
        ]

    return list(jax.pure_callback(run, list(out), *arrays))


def _bits(dtype: np.dtype) -> np.dtype:
    """The integer type of the same size, which numpy and torch both have."""
    return np.dtype({1: np.int8, 2: np.int16, 4: np.int32}[dtype.itemsize])
