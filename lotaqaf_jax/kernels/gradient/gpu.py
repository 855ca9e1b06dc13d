"""The gradient of D on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lotaqaf_jax.kernels.launch import launch
from lotaqaf_jax.quant.weight import QuantizedWeight
from lotaqaf_jax.ternary import Offset, offset_scale

__all__ = ["fits_tiles", "step_gradient"]

_COLUMNS, _ROWS, _WARPS = 64, 64, 4


def fits_tiles(w: QuantizedWeight) -> bool:
    """Whether tiles can hold whole groups: consecutive rows, 16, 32, 64 or 128 of them."""
    return w.g_idx is None and w.group_size in (16, 32, 64, 128)


def step_gradient(w: QuantizedWeight, dweight: jax.Array, *, omega: float, offset: Offset) -> jax.Array:
    """:func:`lotaqaf_jax.ternary.step_gradient` for weights that fit tiles, in place of ``dweight``."""
    from lotaqaf_jax.kernels.gradient.triton import step_gradient_kernel

    n_in, n_out = w.shape
    groups = max(1, _ROWS // w.group_size)
    (dd,) = launch(
        step_gradient_kernel,
        dweight,
        w.scales,
        (offset_scale(omega, offset) / w.group_rows()).astype(jnp.float32),
        out=[jax.ShapeDtypeStruct(w.shape, dweight.dtype)],
        grid=(-(-n_out // _COLUMNS), -(-w.groups // groups)),
        num_warps=_WARPS,
        num_stages=1,
        fuse=True,
        aliases={0: 0},
        K=n_in,
        N=n_out,
        groups=w.groups,
        GROUP=w.group_size,
        OFFSET=offset != "none",
        GROUPS=groups,
        BLOCK_N=_COLUMNS,
    )
    return dd
