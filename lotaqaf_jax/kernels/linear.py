"""The quantised linear layer, with or without adapters in its weight: y = x @ W'.

The dequantised weight exists only while one layer is computed: the forward pass keeps the packed words, the adapters
and x, and the backward pass builds the weight again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lotaqaf_jax import qalora
from lotaqaf_jax.kernels import sharded
from lotaqaf_jax.kernels.adapter import GroupLowRank, TernaryAdapter, WeightAdapter
from lotaqaf_jax.kernels.adjust import gpu as adjust
from lotaqaf_jax.kernels.choose import Implementation, choose
from lotaqaf_jax.kernels.float8 import float8_weight_gradient
from lotaqaf_jax.kernels.gradient import gpu as gradient
from lotaqaf_jax.kernels.merge import merge_adapter
from lotaqaf_jax.kernels.sharding import MatrixSharding
from lotaqaf_jax.quant.weight import QuantizedWeight
from lotaqaf_jax.ternary import adapter_gradients, adjusted_weight, check_settings

__all__ = ["keep_product", "keep_products", "quantized_linear", "weight_matrix"]


_PRODUCT = "lotaqaf_product"

keep_products = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
"""A policy for ``jax.checkpoint``: keep the outputs of linear layers, recompute the rest."""


def weight_matrix(
    w: QuantizedWeight, adapter: WeightAdapter | None, dtype: Any, implementation: str | None = None
) -> jax.Array:
    """The matrix that multiplies x: W, or W' with adapters, (in, out), rounded once to ``dtype``.

    All implementations give the same bits. The product must see the same operand, and be compiled the same way, whether
    it came from adapters or from merged words: a compiler that draws part of the dequantisation into its matrix product
    (XLA on the CPU does) sums in another order. The detour by the bits of the float, which costs nothing, keeps it out.
    """
    if isinstance(adapter, GroupLowRank):
        w, adapter = merge_adapter(w, adapter), None
    if choose(implementation) == "triton":
        return adjust.dequantized(w, dtype) if adapter is None else adjust.adjusted(w, adapter, dtype)
    if adapter is None:
        matrix = w.dequantize()
    else:
        matrix = adjusted_weight(
            w,
            adapter.a,
            adapter.b,
            omega=adapter.omega,
            offset=adapter.offset,
            offset_dtype=adapter.offset_dtype,
        )
    matrix = matrix.astype(dtype)
    bits = jax.lax.bitcast_convert_type(matrix, {4: jnp.uint32, 2: jnp.uint16}[matrix.dtype.itemsize])
    return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(bits), dtype)


def quantized_linear(
    x: jax.Array,
    w: QuantizedWeight,
    adapter: WeightAdapter | None = None,
    *,
    rebuild: bool = True,
    implementation: str | None = None,
    sharding: MatrixSharding | None = None,
) -> jax.Array:
    """y = x @ W', with W' = scales * (q + T - zeros + mu) rounded to the type of ``x``; T = 0 for QA-LoRA.

    Gradients reach ``x`` and float adapters; ``w`` is frozen:

        dx = dy @ W'.T;   dA, dB as :func:`lotaqaf_jax.ternary.adapter_gradients` of dW' = x.T @ dy, or as
        :func:`lotaqaf_jax.qalora.adapter_gradients`, which needs no dW'

    Args:
        x: (..., in), a float type.
        w: the quantised weight (in, out).
        adapter: adapters in the weight, or None for W itself (a merged weight brings its own offset).
        rebuild: whether the backward pass builds W again where there is no adapter to say so.
        implementation: see :func:`lotaqaf_jax.kernels.choose.choose`.
        sharding: how the arrays lie on a mesh; None for one device.

    Returns:
        (..., out) in the type of ``x``.

    Raises:
        ConfigError: an unknown implementation, or adapter settings out of range.
    """
    if isinstance(adapter, TernaryAdapter):
        check_settings(adapter.rank, adapter.omega, adapter.offset, adapter.surrogate)
    return _linear(x, w, adapter, rebuild if adapter is None else adapter.rebuild, choose(implementation), sharding)


def keep_product(y: jax.Array) -> jax.Array:
    """``y``, as an output that :data:`keep_products` keeps."""
    return checkpoint_name(y, _PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _linear(
    x: jax.Array,
    w: QuantizedWeight,
    adapter: WeightAdapter | None,
    rebuild: bool,
    implementation: Implementation,
    sharding: MatrixSharding | None,
) -> jax.Array:
    return _product(x, w, adapter, implementation, sharding)[0]


_Saved = tuple[jax.Array, QuantizedWeight, WeightAdapter | None, jax.Array | None]


def _linear_fwd(
    x: jax.Array,
    w: QuantizedWeight,
    adapter: WeightAdapter | None,
    rebuild: bool,
    implementation: Implementation,
    sharding: MatrixSharding | None,
) -> tuple[jax.Array, _Saved]:
    y, matrix = _product(x, w, adapter, implementation, sharding)
    return keep_product(y), (x, w, adapter, None if rebuild else matrix)


def _linear_bwd(
    rebuild: bool, implementation: Implementation, sharding: MatrixSharding | None, saved: _Saved, dy: jax.Array
) -> tuple[jax.Array, None, WeightAdapter | None]:
    x, w, adapter, matrix = saved
    gradients = functools.partial(_gradients, implementation)
    if sharding is None:
        dx, pair = gradients(x, w, adapter, matrix, dy)
    else:
        dx, pair = sharded.backward(x, w, adapter, matrix, dy, sharding, gradients)
    if adapter is None or pair is None:
        return dx, None, None
    da, db = pair
    found = dataclasses.replace(adapter, a=da.astype(adapter.a.dtype), b=db.astype(adapter.b.dtype))
    if isinstance(found, TernaryAdapter):
        found = dataclasses.replace(found, omega=jnp.zeros_like(found.omega))
    return dx, None, found


_linear.defvjp(_linear_fwd, _linear_bwd)


def _product(
    x: jax.Array,
    w: QuantizedWeight,
    adapter: WeightAdapter | None,
    implementation: Implementation,
    sharding: MatrixSharding | None,
) -> tuple[jax.Array, jax.Array]:
    """(x @ W', W')."""

    def product(x: jax.Array, w: QuantizedWeight, adapter: WeightAdapter | None) -> tuple[jax.Array, jax.Array]:
        matrix = weight_matrix(w, adapter, x.dtype, implementation)
        return x @ matrix, matrix

    return product(x, w, adapter) if sharding is None else sharded.forward(x, w, adapter, sharding, product)


def _gradients(
    implementation: Implementation,
    x: jax.Array,
    w: QuantizedWeight,
    adapter: WeightAdapter | None,
    matrix: jax.Array | None,
    dy: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """dx, and dA and dB of float adapters, on one device."""
    if matrix is None:
        matrix = weight_matrix(w, adapter, x.dtype, implementation)
    # Contractions rather than transposes, which XLA may write out in full.
    dx = jax.lax.dot_general(dy, matrix, (((dy.ndim - 1,), (1,)), ((), ())))
    if adapter is None or not jnp.issubdtype(adapter.a.dtype, jnp.floating):
        return dx, None
    rows = math.prod(x.shape[:-1])
    x, dy = x.reshape(rows, -1), dy.reshape(rows, -1)
    if isinstance(adapter, GroupLowRank):
        return dx, qalora.adapter_gradients(w, adapter.a, adapter.b, x, dy, scale=adapter.scale, pool=adapter.pool)
    factor = None
    if adapter.float8 and x.dtype == jnp.bfloat16:  # The product, before its factor, is beyond the range of float16.
        dweight, factor = float8_weight_gradient(x, dy, implementation)
    else:
        # The product accumulates in float32 whatever its type; t-SignSGD reads sign and rank, for which 16 bits do, at
        # half the memory.
        dweight = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))
    fused = implementation == "triton" and gradient.fits_tiles(w)
    function = gradient.adapter_gradients if fused else adapter_gradients
    rule: Any = {"omega": adapter.omega, "offset": adapter.offset, "surrogate": adapter.surrogate}
    da, db = function(w, adapter.a, adapter.b, dweight, **rule)
    return dx, (da, db) if factor is None else (da * factor, db * factor)
