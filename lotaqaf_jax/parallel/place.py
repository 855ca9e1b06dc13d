"""Putting a decoder on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lotaqaf_jax.kernels.sharding import Axes, MatrixSharding, axes_names, batch_axes, spec
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.models.layers import Linear
from lotaqaf_jax.parallel.rules import decoder_sharding, linear_sharding

__all__ = ["put_rows", "shard", "whole"]


def shard(model: Decoder, mesh: Mesh) -> Decoder:
    """The same decoder on a mesh, by the rules of :mod:`lotaqaf_jax.parallel.rules`.

    Every variable has the axes of its matrix (layers, in, out), or of its array, as ``out_sharding``, for tools that
    look for that; :meth:`Linear.weight_shardings` and :meth:`Linear.adapter_shardings` have the arrays' own.

    Args:
        model: with or without adapters, its arrays on any devices; or abstract (``nnx.eval_shape``), and then the
            arrays' shapes are given shardings.
        mesh: with the axes data, fsdp and tensor.

    Returns:
        A new model. Adapters that it is given later are placed likewise.
    """
    model = nnx.merge(*nnx.split(model), copy=True)
    where = decoder_sharding(model.config, mesh)
    model.sharding = where
    whole = where.named()
    _place(model.embed_tokens.weight, where.named(where.vocab_axes), (where.vocab_axes, ()))
    _place(model.norm.weight, whole, ((),))
    for segment, (start, _) in zip(model.segments, model.spec.runs(), strict=True):
        for norm in (segment.input_layernorm, segment.post_attention_layernorm):
            _place(norm.weight, whole, ((), ()))
        for path, about in model.spec.layers[start]:
            linear = segment.linear(path)
            linear.sharding = linear_sharding(model.config, path.split(".")[1], about, mesh)
            _place_linear(linear, linear.sharding)
    head = model.lm_head
    if head is not None:
        if head.is_quantized:  # Rare, and small beside the rest: whole everywhere.
            head.sharding = MatrixSharding(mesh)
            _place_linear(head, head.sharding)
        else:
            _place(head.weight, where.named(where.vocab_axes), (where.vocab_axes, ()))
    return model


def put_rows(model: Decoder, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A batch on the model's devices, without waiting for it: each gets its rows.

    Every process gives the whole batch, and keeps what its devices need of it.

    Args:
        model: on a mesh, or on one device.
        batch: arrays (rows, ...) in the host's memory. Rows that cannot be cut evenly go whole to every device.
    """
    if model.sharding is None:
        return jax.device_put(dict(batch))
    mesh = model.sharding.mesh
    return {name: _send(np.asarray(array), spec(batch_axes(mesh, len(array))), mesh) for name, array in batch.items()}


def whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are not on the mesh yet, counters for example, on all of its devices; the others as they are."""

    def put(leaf: jax.Array) -> jax.Array:
        if isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh:
            return leaf
        return _send(np.asarray(leaf), spec(), mesh)

    return jax.tree.map(put, tree)


def _send(array: np.ndarray, where: P, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, where), lambda index: array[index])


def _place_linear(linear: Linear, sharding: MatrixSharding) -> None:
    """Its weight, bias and adapters."""
    stack: tuple[Axes, ...] = ((),) * linear.stacked
    linear.weight.set_value(_put(linear.weight.get_value(), linear.weight_shardings()))
    linear.weight.set_metadata(out_sharding=axes_names(*stack, sharding.row_axes, sharding.column_axes))
    if linear.bias is not None:
        _place(linear.bias, sharding.named(*stack, sharding.column_axes), (*stack, sharding.column_axes))
    adapters = linear.adapters
    if adapters is not None:
        linear.set_adapters(_put(adapters, linear.adapter_shardings(adapters)))


def _place(variable: nnx.Variable, where: NamedSharding, axes: tuple[Axes, ...]) -> None:
    variable.set_value(_put(variable.get_value(), where))
    variable.set_metadata(out_sharding=axes_names(*axes))


def _put(value: Any, where: Any) -> Any:
    """Arrays on the devices of their shardings; shapes with their shardings."""

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, value, where)
