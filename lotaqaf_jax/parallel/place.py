"""Putting a decoder on a mesh."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lotaqaf_jax.kernels.sharding import Axes, MatrixSharding
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.models.layers import Linear
from lotaqaf_jax.parallel.rules import decoder_sharding, linear_sharding

__all__ = ["shard"]


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
        for path, spec in model.spec.layers[start]:
            linear = segment.linear(path)
            linear.sharding = linear_sharding(model.config, path.split(".")[1], spec, mesh)
            _place_linear(linear, linear.sharding)
    head = model.lm_head
    if head is not None:
        if head.is_quantized:  # Rare, and small beside the rest: whole everywhere.
            head.sharding = MatrixSharding(mesh)
            _place_linear(head, head.sharding)
        else:
            _place(head.weight, where.named(where.vocab_axes), (where.vocab_axes, ()))
    return model


def _place_linear(linear: Linear, sharding: MatrixSharding) -> None:
    """Its weight, bias and adapters."""
    stack: tuple[Axes, ...] = ((),) * linear.stacked
    linear.weight.set_value(_put(linear.weight.get_value(), linear.weight_shardings()))
    linear.weight.set_metadata(out_sharding=_named(*stack, sharding.row_axes, sharding.column_axes))
    if linear.bias is not None:
        _place(linear.bias, sharding.named(*stack, sharding.column_axes), (*stack, sharding.column_axes))
    if linear.adapter is not None:
        linear.set_adapters(_put(linear.adapters, linear.adapter_shardings(linear.adapters)))


def _place(variable: nnx.Variable, where: NamedSharding, axes: tuple[Axes, ...]) -> None:
    variable.set_value(_put(variable.get_value(), where))
    variable.set_metadata(out_sharding=_named(*axes))


def _named(*axes: Axes) -> tuple[Any, ...]:
    """As flax writes them: None, a name, or several."""
    return tuple(None if not one else one[0] if len(one) == 1 else one for one in axes)


def _put(value: Any, where: Any) -> Any:
    """Arrays on the devices of their shardings; shapes with their shardings."""

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, value, where)
