"""The packed matmul: the equation in plain JAX, and the choice between it and the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels.choose import choose
from lotaqaf_jax.quant.weight import QuantizedWeight

__all__ = ["layer_of", "packed_matmul", "packed_matmul_many", "reference"]


def packed_matmul(
    x: jax.Array,
    w: QuantizedWeight,
    bias: jax.Array | None = None,
    *,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y = x @ W + bias, W = scales * (q - zeros + offset), for the few rows of a decoding step.

    On a card, up to 128 rows, W is never made: a kernel reads the packed words. It multiplies x by q - zeros, which
    16 bits hold exactly, sums each group in float32 and multiplies the sum by its scale in float32; with an offset,
    q - zeros + offset is rounded to the type of x. That is as exact as rounding W itself to the type of x, or more,
    and takes an instruction less for every weight. A float32 x enters in three parts of 8 bits, so nothing of it is
    lost. The result is the same in every run, and depends on the number of rows only through the bucket it falls into
    (8, 16, 32, 64, 128). Other cases make W with a kernel first: more rows, act-order, groups that are not whole
    periods of the bitstream, and float32 with an offset.

    Args:
        x: (rows, in), bfloat16, float16 or float32.
        w: the quantised weight (in, out); or a stack of them, every array with a leading axis of layers.
        bias: (out,), or (layers, out) with a stack; or None.
        layer: which of the stack, a scalar or of shape (1,), possibly traced. The kernel reads the stack in place,
            where a slice would be copied.
        implementation: see :func:`lotaqaf_jax.kernels.choose.choose`.

    Returns:
        (rows, out) in the type of ``x``; sums are float32, rounded once.

    Raises:
        ConfigError: an unknown implementation, or arguments that do not fit each other.
    """
    return packed_matmul_many(x, (w,), (bias,), layer=layer, implementation=implementation)[0]


def packed_matmul_many(
    x: jax.Array,
    weights: Sequence[QuantizedWeight],
    biases: Sequence[jax.Array | None] | None = None,
    *,
    layer: jax.Array | int | None = None,
    whole: bool = True,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """y_i = x @ W_i + bias_i: :func:`packed_matmul` for several weights of one x, such as q, k and v.

    On a card up to three weights that are alike (bits, group size, types of scales, offset and bias, none with
    act-order) take one launch, which reads each where it lies: a launch costs microseconds of its own, as much as
    reading a small matrix. Others take a launch each. How many warps share a sum goes by the columns of the launch, so
    a result can differ from that of a single call, by the rounding of a float32 sum in another order.

    Args:
        x: (rows, in), bfloat16, float16 or float32.
        weights: the quantised weights (in, out_i), or stacks of them.
        biases: (out_i,), or (layers, out_i) with stacks, or None, for every weight; or None for no bias at all.
        layer: as in :func:`packed_matmul`, the same for all.
        whole: False for a caller whose own kernel can add what programs that share a sum have of it, see below.
        implementation: see :func:`lotaqaf_jax.kernels.choose.choose`.

    Returns:
        (rows, out_i) for every weight, in the type of ``x``; sums are float32, rounded once. Without ``whole`` and
        without a bias also (parts, rows, out_i) float32, whose sum from the first to the last, rounded, is y_i.

    Raises:
        ConfigError: an unknown implementation, or arguments that do not fit each other.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not weights or len(biases) != len(weights):
        raise ConfigError(
            f"packed_matmul_many: found {len(weights)} weights and {len(biases)} biases; pass at least one weight, and "
            "a bias or None for each."
        )
    for w, bias in zip(weights, biases, strict=True):
        _check(x, w, bias, layer)
    if choose(implementation) == "xla":
        return tuple(reference(x, *layer_of(w, bias, layer)) for w, bias in zip(weights, biases, strict=True))
    from lotaqaf_jax.kernels.matmul import gpu

    return gpu.matmul(x, weights, biases, layer, whole)


def reference(x: jax.Array, w: QuantizedWeight, bias: jax.Array | None) -> jax.Array:
    """The equation: W rounded to the type of x, products summed in float32."""
    return matmul(x, w.dequantize(x.dtype), bias)


def matmul(x: jax.Array, matrix: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x @ matrix + bias in float32, rounded to the type of x."""
    y = jnp.matmul(x, matrix, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def layer_of(
    w: QuantizedWeight, bias: jax.Array | None, layer: jax.Array | int | None
) -> tuple[QuantizedWeight, jax.Array | None]:
    """One layer of a stack."""
    if layer is None:
        return w, bias
    index = jnp.asarray(layer, jnp.int32).reshape(())

    def take(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)

    return jax.tree.map(take, w), None if bias is None else take(bias)


def _check(x: jax.Array, w: QuantizedWeight, bias: jax.Array | None, layer: jax.Array | int | None) -> None:
    n_in, n_out = w.shape
    if x.ndim != 2 or x.shape[1] != n_in:
        raise ConfigError(f"packed_matmul: x has shape {x.shape}, expected (rows, {n_in}); reshape it to two axes.")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ConfigError(f"packed_matmul: x is {x.dtype}, expected bfloat16, float16 or float32.")
    stacked = w.qweight.ndim - 2
    if stacked != (layer is not None):
        raise ConfigError(
            f"packed_matmul: qweight has shape {w.qweight.shape}, which is {stacked} axes of layers, and layer is "
            f"{'given' if layer is not None else 'None'}; pass layer with a stack, and only then."
        )
    expected = (*w.qweight.shape[:-2], n_out)
    if bias is not None and bias.shape != expected:
        raise ConfigError(f"packed_matmul: bias has shape {bias.shape}, expected {expected}.")
