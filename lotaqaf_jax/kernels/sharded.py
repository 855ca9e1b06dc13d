"""The quantised linear layer and the merge on a mesh: what each device computes, and what travels between them.

Every device runs the functions of one device on its part of the matrix, so that kernels need not know of meshes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels.adapter import GroupLowRank, WeightAdapter
from lotaqaf_jax.kernels.sharding import (
    DATA,
    FSDP,
    TENSOR,
    Axes,
    MatrixSharding,
    adapter_specs,
    batch_axes,
    batch_shards,
    spec,
    weight_specs,
)
from lotaqaf_jax.quant.weight import QuantizedWeight

__all__ = ["backward", "forward", "merge_stack", "shard_map", "tensor_sum"]

Forward = Callable[[jax.Array, QuantizedWeight, WeightAdapter | None], tuple[jax.Array, jax.Array]]
Backward = Callable[
    [jax.Array, QuantizedWeight, WeightAdapter | None, jax.Array | None, jax.Array],
    tuple[jax.Array, tuple[jax.Array, jax.Array] | None],
]


def shard_map(function: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``jax.shard_map`` without the check of what varies: Triton calls do not say."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def forward(
    x: jax.Array, w: QuantizedWeight, adapter: WeightAdapter | None, sharding: MatrixSharding, product: Forward
) -> tuple[jax.Array, jax.Array]:
    """y = x @ W' and W', both over the mesh.

    Args:
        x: (rows, ..., in); its first axis is cut over :data:`BATCH` where that goes evenly.
        w: the weight.
        adapter: its adapters, or None.
        sharding: how they lie.
        product: (x, w, adapter) -> (x @ W', W') of one device; where TENSOR cuts the rows of W, partial sums, which
            are added in float32.

    Returns:
        y (rows, ..., out), and the matrix (in, out) in the type of ``x``, cut by TENSOR alone.
    """
    rows = batch_axes(sharding.mesh, x.shape[0])

    def local(x: jax.Array, w: QuantizedWeight, adapter: WeightAdapter | None) -> tuple[jax.Array, jax.Array]:
        y, matrix = product(x, *_gathered(w, adapter, sharding))
        return tensor_sum(y, sharding.rows), matrix

    return shard_map(
        local,
        sharding.mesh,
        (_of_input(x, rows, sharding), *_specs(w, adapter, sharding)),
        (_of_output(x, rows, sharding), _of_matrix(sharding)),
    )(x, w, adapter)


def backward(
    x: jax.Array,
    w: QuantizedWeight,
    adapter: WeightAdapter | None,
    matrix: jax.Array | None,
    dy: jax.Array,
    sharding: MatrixSharding,
    gradients: Backward,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """dx, and the adapters' gradients summed over all rows of the batch.

    What travels is dx where TENSOR cuts columns, and dA and dB, which are small: never dW'.

    Args:
        x: as of :func:`forward`.
        w: the same.
        adapter: the same.
        matrix: W' of :func:`forward`, or None to build it again.
        dy: (rows, ..., out).
        sharding: how they lie.
        gradients: (x, w, adapter, matrix, dy) -> (dx, (dA, dB) or None) of one device.

    Raises:
        ConfigError: the rows of the batch cannot be cut evenly, and adapters want a gradient.
    """
    rows = batch_axes(sharding.mesh, x.shape[0])

    def local(
        x: jax.Array, w: QuantizedWeight, adapter: WeightAdapter | None, matrix: jax.Array | None, dy: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        dx, pair = gradients(x, *_gathered(w, adapter, sharding), matrix, dy)
        dx = tensor_sum(dx, sharding.columns)
        if pair is None:
            return dx, None
        da, db = pair
        # dA sums over the columns of W, dB over its rows, and both over the rows of the batch.
        da = _reduced(da, TENSOR if sharding.columns else None, 0 if _stores_rows(adapter, sharding) else None)
        db = _reduced(db, TENSOR if sharding.rows else None, 1 if sharding.stored_columns else None)
        return dx, (da, db)

    wanted = adapter is not None and jnp.issubdtype(adapter.a.dtype, jnp.floating)
    if wanted and not rows:
        raise ConfigError(
            f"a batch of {x.shape[0]} rows cannot be cut into {batch_shards(sharding.mesh)} equal parts, one for each "
            "device of the axes data and fsdp; give it a multiple of that many rows."
        )
    pair_specs = None
    if wanted and adapter is not None:
        specs = adapter_specs(adapter, sharding)
        pair_specs = (specs.a, specs.b)
    return shard_map(
        local,
        sharding.mesh,
        (
            _of_input(x, rows, sharding),
            *_specs(w, adapter, sharding),
            None if matrix is None else _of_matrix(sharding),
            _of_output(dy, rows, sharding),
        ),
        (_of_input(x, rows, sharding), pair_specs),
    )(x, w, adapter, matrix, dy)


def merge_stack(
    words: jax.Array,
    rest: QuantizedWeight,
    adapters: WeightAdapter,
    sharding: MatrixSharding,
    function: Callable[[jax.Array, QuantizedWeight, WeightAdapter], Any],
    out: tuple[str, ...],
) -> Any:
    """``function`` (words, rest, adapters) of the layers of a stack, of each device's own part; nothing is gathered
    but A.

    Args:
        words: qweight (layers, words, out).
        rest: the weight without it.
        adapters: of the stack.
        sharding: how they lie.
        function: of one device, gives as many results as ``out`` has names.
        out: what each result is: "words" like ``words``, "groups" like scales, "count" a number for every layer that
            is to be summed over the devices.
    """
    weight = weight_specs(dataclasses.replace(rest, qweight=words), sharding, 1)
    specs = {"words": weight.qweight, "groups": weight.scales, "count": P(None)}

    def local(words: jax.Array, rest: QuantizedWeight, adapters: WeightAdapter) -> Any:
        rest = dataclasses.replace(rest, shape=(rest.shape[0] // sharding.row_parts, words.shape[-1]))
        if _stores_rows(adapters, sharding):
            adapters = dataclasses.replace(adapters, a=_all(adapters.a, -2))
        axes = sharding.row_axes + sharding.column_axes
        found = function(words, rest, adapters)
        return tuple(
            jax.lax.psum(one, axes) if kind == "count" and axes else one for one, kind in zip(found, out, strict=True)
        )

    nothing: Any = None
    without = dataclasses.replace(weight, qweight=nothing)
    in_specs = (weight.qweight, without, adapter_specs(adapters, sharding, 1))
    shape = jax.eval_shape(function, words, rest, adapters)
    out_specs = tuple(None if one is None else specs[kind] for one, kind in zip(shape, out, strict=True))
    return shard_map(local, sharding.mesh, in_specs, out_specs)(words, rest, adapters)


def _specs(w: QuantizedWeight, adapter: WeightAdapter | None, sharding: MatrixSharding) -> tuple[Any, Any]:
    return weight_specs(w, sharding), None if adapter is None else adapter_specs(adapter, sharding)


def _gathered(
    w: QuantizedWeight, adapter: WeightAdapter | None, sharding: MatrixSharding
) -> tuple[QuantizedWeight, WeightAdapter | None]:
    """A device's part of the matrix, whole over FSDP: what it computes with."""
    if sharding.stored_columns:
        # Packed, as it lies; g_idx has no columns.
        parts: Any = {"qweight": _all(w.qweight, -1), "scales": _all(w.scales, -1), "zeros": _all(w.zeros, -1)}
        parts |= {"offset": None if w.offset is None else _all(w.offset, -1)}
        w = dataclasses.replace(w, **parts)
        if adapter is not None:
            adapter = dataclasses.replace(adapter, b=_all(adapter.b, -1))
    if adapter is not None and _stores_rows(adapter, sharding):
        adapter = dataclasses.replace(adapter, a=_all(adapter.a, -2))
    return dataclasses.replace(w, shape=(w.shape[0] // sharding.row_parts, w.qweight.shape[-1])), adapter


def _stores_rows(adapter: WeightAdapter | None, sharding: MatrixSharding) -> bool:
    return sharding.stored_rows and not isinstance(adapter, GroupLowRank)


def _all(array: jax.Array, axis: int) -> jax.Array:
    return jax.lax.all_gather(array, FSDP, axis=axis % array.ndim, tiled=True)


def tensor_sum(part: jax.Array, cut: bool) -> jax.Array:
    """The sum over TENSOR of products of parts, in float32, rounded once to their type; ``part`` if not ``cut``."""
    if not cut:
        return part
    return jax.lax.psum(part.astype(jnp.float32), TENSOR).astype(part.dtype)


def _reduced(gradient: jax.Array, over: str | None, cut: int | None) -> jax.Array:
    """A gradient summed over the devices' rows, and over ``over``; each keeps its part of the axis ``cut``."""
    axes = (DATA, *(() if over is None else (over,)))
    if cut is None:
        return jax.lax.psum(gradient, (*axes, FSDP))
    part = jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=cut, tiled=True)
    return jax.lax.psum(part, axes)


def _of_input(x: jax.Array, rows: Axes, sharding: MatrixSharding) -> P:
    return spec(rows, *[None] * (x.ndim - 2), sharding.row_axes)


def _of_output(x: jax.Array, rows: Axes, sharding: MatrixSharding) -> P:
    return spec(rows, *[None] * (x.ndim - 2), sharding.product_axes)


def _of_matrix(sharding: MatrixSharding) -> P:
    return spec(sharding.row_axes, sharding.product_axes)
