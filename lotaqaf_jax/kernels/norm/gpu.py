"""A residual sum and the norm that follows on a GPU: the kernel's arguments. Equation: :func:`.norm.reference`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.launch import interpreted, launch
from lotaqaf_jax.kernels.sizes import padded

__all__ = ["add_norm", "fits"]

_MOST_ROWS = 128  # Beyond these XLA's own fusions keep the card busy.
_MOST_COLUMNS = 16384  # of a row, which one program holds in its registers
_PER_THREAD = 8  # values, one load of 16 bytes: with more a thread waits for one load after the other


def fits(x: jax.Array) -> bool:
    """Whether the rows are few, of 16 bits, and each small enough for one program."""
    return (
        x.dtype in (jnp.bfloat16, jnp.float16) and x.size // x.shape[-1] <= _MOST_ROWS and x.shape[-1] <= _MOST_COLUMNS
    )


def add_norm(
    x: jax.Array, update: jax.Array, weight: jax.Array, eps: float, layer: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """:func:`.norm.add_norm` for what fits, a program a row."""
    from lotaqaf_jax.kernels.norm.triton import add_norm_kernel

    size = x.shape[-1]
    rows = x.size // size
    block = padded(size)
    total, normed = launch(
        add_norm_kernel,
        x,
        update,
        weight,
        jnp.asarray(layer, jnp.int32).reshape(1),
        float(eps),
        out=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        grid=(rows,),
        num_warps=max(4, min(32, block // (32 * _PER_THREAD))),
        num_stages=1,
        LAYERS=weight.shape[0],
        ROWS=rows,
        SIZE=size,
        PARTS=update.shape[0] if update.ndim > x.ndim else 1,
        BLOCK=block,
        INTERPRET=interpreted(),
    )
    return total, normed
