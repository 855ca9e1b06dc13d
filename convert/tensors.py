"""The tensors of a decoder under the names of a Hugging Face checkpoint, taken off the layer stacks one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, Linear, adapted_linears, linears
from lotaqaf_jax.quant import QuantizedWeight, encode_zeros, packed_size
from lotaqaf_jax.quant.folder import PARTS
from lotaqaf_jax.quant.weight import trivial_g_idx

__all__ = [
    "HFTensor",
    "dense_tensors",
    "hf_tensors",
    "named_linears",
    "quantized_stacks",
    "quantized_weights",
    "refuse_adapters",
    "take",
]

_encode_zeros = jax.jit(encode_zeros, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """A tensor of a checkpoint: its name, type and shape, and ``read()``, which fetches it from the device."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


def named_linears(model: Decoder) -> Iterator[tuple[str, Linear, int | None]]:
    """Every linear layer by its full name, the output head included.

    Yields:
        (name, linear, i): layer i of the stack that ``linear`` holds; None where it is no stack.
    """
    for names, linear in linears(model):
        for i, name in enumerate(names):
            yield name, linear, i
    if model.lm_head is not None:
        yield "lm_head", model.lm_head, None


def _at(stack: jax.Array, i: int | None) -> jax.Array:
    return stack if i is None else stack[i]


def take(weight: QuantizedWeight, i: int | None) -> QuantizedWeight:
    """Layer ``i`` of a stack of weights; the weight itself where ``i`` is None."""
    return jax.tree.map(lambda stack: _at(stack, i), weight)


def quantized_stacks(model: Decoder) -> dict[str, tuple[QuantizedWeight, int | None]]:
    """The stack that holds the weight of every quantised module, and where in it, for :func:`take`."""
    return {name: (linear.packed, i) for name, linear, i in named_linears(model) if linear.is_quantized}


def quantized_weights(model: Decoder) -> Iterator[tuple[str, QuantizedWeight]]:
    """Every quantised weight by the name of its module, one layer's arrays at a time."""
    for name, (stack, i) in quantized_stacks(model).items():
        yield name, take(stack, i)


def dense_tensors(model: Decoder) -> dict[str, HFTensor]:
    """Those of :func:`hf_tensors` that are no part of a quantised weight, by name."""
    parts = {f"{module}.{part}" for module in quantized_stacks(model) for part in PARTS}
    return {tensor.name: tensor for tensor in hf_tensors(model) if tensor.name not in parts}


def refuse_adapters(model: Decoder) -> None:
    """Refuse a model whose adapters are not merged.

    Raises:
        ConfigError: it has adapters.
    """
    if any(True for _ in adapted_linears(model)):
        raise ConfigError(
            "the model has adapters that are not merged, and a checkpoint has no place for them. Call "
            "lotaqaf_jax.merge(model) first, or convert.save_adapter to save the adapters themselves."
        )


def hf_tensors(model: Decoder, checkpoint_format: str | None = None) -> Iterator[HFTensor]:
    """Every tensor of the checkpoint that ``model`` makes, in the order of the model; nothing is fetched yet.

    Dense weights are (out, in). A quantised module has ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` (GPTQ on
    disk); its offset, if any, is not among them.

    Args:
        model: the decoder.
        checkpoint_format: the convention of the zero points, ``gptq`` or ``gptq_v2``; None for each weight's own.

    Raises:
        ConfigError: the model has adapters.
    """
    refuse_adapters(model)

    yield _tensor("model.embed_tokens.weight", model.embed_tokens.weight.get_value())
    by_layer: dict[str, list[HFTensor]] = {}
    for segment, (start, count) in zip(model.segments, model.spec.runs(), strict=True):
        for row in range(count):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                name = f"model.layers.{start + row}.{norm}.weight"
                scale = getattr(segment, norm).weight.get_value()
                by_layer.setdefault(_layer_of(name), []).append(_tensor(name, scale, row))
    for name, linear, i in named_linears(model):
        found = by_layer.setdefault(_layer_of(name), [])
        if linear.is_quantized:
            weight = linear.packed
            found.extend(_packed_tensors(name, weight, i, checkpoint_format or weight.checkpoint_format))
        else:
            found.append(_tensor(f"{name}.weight", linear.weight.get_value(), i))
        if linear.bias is not None:
            found.append(_tensor(f"{name}.bias", linear.bias.get_value(), i))
    head = by_layer.pop("lm_head", [])
    for layer in sorted(by_layer, key=lambda prefix: int(prefix.rsplit(".", 1)[1])):
        yield from by_layer[layer]
    yield _tensor("model.norm.weight", model.norm.weight.get_value())
    yield from head


def _tensor(name: str, stack: jax.Array, i: int | None = None) -> HFTensor:
    shape = stack.shape if i is None else stack.shape[1:]
    return HFTensor(name, np.dtype(stack.dtype), tuple(shape), lambda: np.asarray(_at(stack, i)))


def _layer_of(name: str) -> str:
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name


def _packed_tensors(name: str, weight: QuantizedWeight, i: int | None, form: str) -> Iterator[HFTensor]:
    n_in, n_out = weight.shape

    def qzeros() -> np.ndarray:
        return np.asarray(_encode_zeros(_at(weight.zeros, i), weight.bits, form))

    def g_idx() -> np.ndarray:
        return trivial_g_idx(n_in, weight.group_size) if weight.g_idx is None else np.asarray(_at(weight.g_idx, i))

    int32 = np.dtype(np.int32)
    yield _tensor(f"{name}.qweight", weight.qweight, i)
    yield HFTensor(f"{name}.qzeros", int32, (weight.groups, packed_size(n_out, weight.bits)), qzeros)
    yield _tensor(f"{name}.scales", weight.scales, i)
    yield HFTensor(f"{name}.g_idx", int32, (n_in,), g_idx)
