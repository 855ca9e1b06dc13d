"""Linear layer, embedding and norm.

Arrays may carry a leading axis that stacks layers. In training a scan takes it off. In decoding the stack stays whole
and the call names the layer, because a scan copies what it slices before a kernel can read it, and with a token a row
that copy would cost as much as the product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lotaqaf_jax.kernels import AnyAdapter, LowRank, TernaryAdapter, keep_product, quantized_linear
from lotaqaf_jax.kernels.matmul import packed_matmul_many
from lotaqaf_jax.kernels.norm import add_norm, rms_norm
from lotaqaf_jax.kernels.sharding import MatrixSharding, adapter_specs, axes_names, shardings, weight_specs
from lotaqaf_jax.lora import low_rank_product
from lotaqaf_jax.models.sharding import DecoderSharding
from lotaqaf_jax.models.spec import LinearSpec
from lotaqaf_jax.quant.packing import packed_size
from lotaqaf_jax.quant.weight import QuantizedWeight, group_count

__all__ = ["Adapter", "Embed", "Linear", "PackedWeight", "RMSNorm", "Threshold", "products"]


def _at(stack: Any, layer: jax.Array | None) -> Any:
    """Arrays of one layer out of a stack; ``layer`` None where they are one layer's already."""
    if layer is None:
        return stack
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)


class PackedWeight(nnx.Variable):
    """Holds a frozen :class:`~lotaqaf_jax.quant.QuantizedWeight`."""


class Adapter(nnx.Variable):
    """Holds a layer's adapters, of whichever method: all that is trained."""


class Threshold(nnx.Variable):
    """Holds omega of a layer's ternary adapters, float32 of the stack's axes: set anew in training, never by a
    gradient."""


class Linear(nnx.Module):
    """y = x @ W + bias, with W dense or packed integers, and with or without adapters.

    Ternary adapters and those of QA-LoRA change a packed W; those of LoRA add a product of their own to y, whatever W.

    Attributes:
        weight: for a quantised layer a :class:`PackedWeight`, else a Param (..., out, in), as Hugging Face stores it.
        bias: Param (..., out) or None.
        adapter: an :class:`Adapter`, or None.
        threshold: a :class:`Threshold` beside ternary adapters, so that what is trained holds ternary values alone.
        sharding: how the arrays lie on a mesh, see :mod:`lotaqaf_jax.parallel`; None on one device.

    Built with zeros; loading or initialisation replaces them.
    """

    def __init__(self, spec: LinearSpec, stack: tuple[int, ...] = ()) -> None:
        n_in, n_out = spec.in_features, spec.out_features
        self.weight: nnx.Variable
        if spec.quant is None:
            self.weight = nnx.Param(jnp.zeros((*stack, n_out, n_in), spec.dtype))
        else:
            bits, size = spec.quant.bits, spec.quant.group_size
            groups = group_count(n_in, size)
            weight = QuantizedWeight(
                qweight=jnp.zeros((*stack, packed_size(n_in, bits), n_out), jnp.int32),
                scales=jnp.zeros((*stack, groups, n_out), spec.dtype),
                zeros=jnp.zeros((*stack, groups, n_out), jnp.uint8),
                g_idx=jnp.zeros((*stack, n_in), jnp.int32) if spec.quant.act_order else None,
                offset=None,
                bits=bits,
                group_size=size,
                shape=(n_in, n_out),
                checkpoint_format=spec.quant.checkpoint_format,
            )
            self.weight = PackedWeight(weight)
        self.bias = nnx.Param(jnp.zeros((*stack, n_out), spec.bias_dtype)) if spec.bias else nnx.data(None)
        self.adapter: Adapter | None = nnx.data(None)
        self.threshold: Threshold | None = nnx.data(None)
        self.sharding: MatrixSharding | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is held in packed integers."""
        return isinstance(self.weight, PackedWeight)

    @property
    def packed(self) -> QuantizedWeight:
        """The packed weight of a quantised layer."""
        weight = self.weight.get_value()
        if not isinstance(weight, QuantizedWeight):
            raise TypeError("this layer holds a dense weight")
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) of one layer's weight."""
        if self.is_quantized:
            return self.packed.shape
        n_out, n_in = self.weight.get_value().shape[-2:]
        return n_in, n_out

    @property
    def adapters(self) -> AnyAdapter | None:
        """The layer's adapters, or None."""
        if self.adapter is None:
            return None
        adapters = self.adapter.get_value()
        return adapters if self.threshold is None else dataclasses.replace(adapters, omega=self.threshold.get_value())

    def set_adapters(self, adapters: AnyAdapter | None) -> None:
        """Put adapters in place of what there was; None takes them off."""
        self.threshold = nnx.data(None)
        if isinstance(adapters, TernaryAdapter):
            omega = jnp.broadcast_to(jnp.asarray(adapters.omega, jnp.float32), adapters.a.shape[:-2])
            nothing: Any = None
            self.threshold, adapters = Threshold(omega), dataclasses.replace(adapters, omega=nothing)
        self.adapter = nnx.data(None) if adapters is None else Adapter(adapters)
        if self.adapter is not None and self.sharding is not None:
            stack: tuple[Any, ...] = ((),) * self.stacked
            axes = (*stack, self.sharding.adapter_row_axes, self.sharding.column_axes)
            self.adapter.set_metadata(out_sharding=axes_names(*axes))

    @property
    def stacked(self) -> int:
        """How many leading axes stack layers."""
        array = self.packed.qweight if self.is_quantized else self.weight.get_value()
        return array.ndim - 2

    def weight_shardings(self) -> Any:
        """Where the weight's arrays lie, in place of them; of a layer with a ``sharding``."""
        where = self._placed()
        if self.is_quantized:
            return shardings(weight_specs(self.packed, where, self.stacked), where.mesh)
        stack: tuple[None, ...] = (None,) * self.stacked
        return where.named(*stack, where.column_axes, where.row_axes)

    def adapter_shardings(self, adapters: AnyAdapter) -> Any:
        """Where those of ``adapters`` are to lie; of a layer with a ``sharding``."""
        where = self._placed()
        return shardings(adapter_specs(adapters, where, self.stacked), where.mesh)

    def _placed(self) -> MatrixSharding:
        if self.sharding is None:
            raise TypeError("this layer is on no mesh")
        return self.sharding

    @property
    def packs(self) -> bool:
        """Whether W itself is a stack of packed words, which decoding can multiply where they lie."""
        return self.is_quantized and (self.adapters is None or isinstance(self.adapters, LowRank))

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """(..., in) -> (..., out), in the type of ``x``.

        Args:
            x: (..., in).
            layer: () int32, which layer of a stack; None where the arrays are one layer's.
        """
        if layer is not None and self.packs:
            return self._with_low_rank(x, _packed_products(x, [self], layer)[0], layer)
        if self.is_quantized:
            adapters = self.adapters
            within = None if isinstance(adapters, LowRank) else _at(adapters, layer)
            rebuild = adapters is None or adapters.rebuild
            y = quantized_linear(x, _at(self.packed, layer), within, rebuild=rebuild, sharding=self.sharding)
        else:
            table = self._gathered(_at(self.weight.get_value(), layer).astype(x.dtype))
            y = keep_product(jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ()))))
        y = y if self.bias is None else y + _at(self.bias.get_value(), layer).astype(y.dtype)
        return self._with_low_rank(x, y, layer)

    def _gathered(self, table: jax.Array) -> jax.Array:
        """A dense weight (out, in) as it is computed with: cut by tensor alone."""
        if self.sharding is None:
            return table
        where = self.sharding.named(self.sharding.product_axes, self.sharding.row_axes)
        return jax.lax.with_sharding_constraint(table, where)

    def _with_low_rank(self, x: jax.Array, y: jax.Array, layer: jax.Array | None) -> jax.Array:
        """y = x @ W + bias, and LoRA's product where there is one."""
        if not isinstance(self.adapters, LowRank):
            return y
        pair = _at(self.adapters, layer)
        a, b = pair.a, pair.b
        if self.sharding is not None:
            a = jax.lax.with_sharding_constraint(a, self.sharding.named(self.sharding.row_axes))
            b = jax.lax.with_sharding_constraint(b, self.sharding.named((), self.sharding.product_axes))
        return y + low_rank_product(x, a, b, pair.scale)

    def summand(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """What :meth:`RMSNorm.after_sum` adds: the product, which the kernel may leave to it in parts.

        Args:
            x: (..., in).
            layer: as of a call.

        Returns:
            (..., out) in the type of ``x``, as a call; or (parts, ..., out) float32 if their sum, rounded, is that.
        """
        if layer is None or not self.is_quantized or self.adapters is not None:
            return self(x, layer)
        return _packed_products(x, [self], layer, whole=False)[0]


def products(x: jax.Array, linears: Sequence[Linear], layer: jax.Array | None) -> list[jax.Array]:
    """``linear(x, layer)`` of every linear; in decoding, quantised ones in one call, which takes one launch if it can.

    Args:
        x: (..., in).
        linears: layers of one x, such as q, k and v.
        layer: () int32, which layer of a stack; None where the arrays are one layer's.

    Returns:
        (..., out) of every linear, in the type of ``x``.
    """
    if layer is None or not all(linear.packs for linear in linears):
        return [linear(x, layer) for linear in linears]
    ys = _packed_products(x, linears, layer)
    return [linear._with_low_rank(x, y, layer) for linear, y in zip(linears, ys, strict=True)]


def _packed_products(x: jax.Array, linears: Sequence[Linear], layer: jax.Array, whole: bool = True) -> list[jax.Array]:
    """x @ W + bias, (..., out), for one layer of every stack, rounded as in :class:`Linear`.

    Without ``whole`` perhaps (parts, ..., out), see :func:`.packed_matmul_many`.
    """
    weights = [linear.packed for linear in linears]
    biases = [None if linear.bias is None else linear.bias.get_value() for linear in linears]
    ys = packed_matmul_many(x.reshape(-1, x.shape[-1]), weights, biases, layer=layer, whole=whole)
    return [y.reshape(*y.shape[:-2], *x.shape[:-1], -1) for y in ys]


@jax.custom_vjp
def wide_logits(x: jax.Array, table: jax.Array) -> jax.Array:
    """x @ table.T in float32, whatever the type of the operands: 16-bit logits would tie where float32 ones do not.

    The gradient of the logits is rounded to the type of ``x`` before it is multiplied; otherwise JAX would widen the
    table to float32 instead.

    Args:
        x: (..., hidden).
        table: (vocab, hidden) in the type of ``x``.

    Returns:
        (..., vocab) float32.
    """
    return jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _wide_logits_fwd(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return wide_logits(x, table), (x, table)


def _wide_logits_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, table = saved
    dy = dy.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(dy, table, (((x.ndim - 1,), (0,)), ((), ())))
    return dx, jax.lax.dot_general(dy, x, ((rows, rows), ((), ())))


wide_logits.defvjp(_wide_logits_fwd, _wide_logits_bwd)


class Embed(nnx.Module):
    """Token embedding: row ``ids`` of the table; the table's transpose where it is the output head too."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: Any) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab_size, hidden_size), dtype))

    def __call__(self, ids: jax.Array, dtype: Any, sharding: DecoderSharding | None = None) -> jax.Array:
        """(batch, length) int32 -> (batch, length, hidden) of ``dtype``; ``sharding`` as the decoder has it."""
        table = self.weight.get_value()
        found = jnp.take(table, ids, axis=0) if sharding is None else sharding.take(table, ids)
        return found.astype(dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """(..., hidden) -> (..., vocab) float32: x @ table.T."""
        return wide_logits(x, self.weight.get_value().astype(x.dtype))


class RMSNorm(nnx.Module):
    """weight * x / sqrt(mean(x**2) + eps), the mean in float32."""

    def __init__(self, size: int, eps: float, dtype: Any, stack: tuple[int, ...] = ()) -> None:
        self.weight = nnx.Param(jnp.ones((*stack, size), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """(..., size) -> (..., size), in the type of ``x``; ``layer`` as in :class:`Linear`."""
        return rms_norm(x, _at(self.weight.get_value(), layer), self.eps)

    def after_sum(self, x: jax.Array, update: jax.Array, layer: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """x + update, and its norm, both (..., size): :func:`lotaqaf_jax.kernels.norm.add_norm`.

        Args:
            x: (..., size).
            update: from :meth:`Linear.summand`.
            layer: as in :class:`Linear`; where there are fewer layers, the last one.
        """
        return add_norm(x, update, self.weight.get_value(), self.eps, layer)
