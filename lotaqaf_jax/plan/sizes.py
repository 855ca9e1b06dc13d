"""What is planned: a model's weights, the settings of a step, how both are spread over devices; and how much there is
of everything on one device, in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models.adapters import TARGET_MODULES, check_targets
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.decoder import Recompute
from lotaqaf_jax.models.spec import DecoderSpec, LinearSpec, QuantSpec, dense_spec
from lotaqaf_jax.parallel.rules import ROWS, cuts_rows
from lotaqaf_jax.quant.packing import check_bits, packed_size
from lotaqaf_jax.quant.weight import group_count

__all__ = [
    "FLAGS",
    "ONE_DEVICE",
    "Layout",
    "Settings",
    "Shape",
    "adapter_values",
    "parts",
    "projections",
    "shape_of",
    "weight_bytes",
]

FLAGS = {"data": "data_parallel", "tensor": "tensor_parallel"}
"""The flags of what :class:`Layout` calls otherwise."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model: ``config`` its sizes, ``spec`` how every weight is held."""

    config: DecoderConfig
    spec: DecoderSpec


def shape_of(config: DecoderConfig, bits: int = 4, group_size: int = 128, stored: Any = jnp.float16) -> Shape:
    """The shape of a model whose projections are all quantised alike.

    Args:
        config: its sizes.
        bits: 2, 3, 4 or 8; 16 for a model that is not quantised.
        group_size: rows in a group; -1 for one group.
        stored: type of scales, embeddings, biases and norms.

    Raises:
        ConfigError: another width, or a group size that is neither -1 nor positive.
    """
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"--group_size: found {group_size}, expected 1 or more, or -1 for one group.")
    quant = None if bits == 16 else QuantSpec(check_bits(bits, "--bits"), group_size)
    return Shape(config, dense_spec(config, stored, quant))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices as a mesh: batch rows are split over ``data`` and ``fsdp``, weights over ``fsdp`` and ``tensor``."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{FLAGS.get(name, name)}: found {getattr(self, name)}, expected 1 or more.")

    @property
    def count(self) -> int:
        """Devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def replicas(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.data * self.fsdp

    def check(self, shape: Shape) -> None:
        """Whether a model can be split so.

        Raises:
            ConfigError: fsdp and tensor do not divide a weight's outputs, which JAX does not split unevenly; or tensor
                does not divide the heads, or cuts through a group of a weight's inputs.
        """
        t, config = self.tensor, shape.config
        if config.num_key_value_heads % t:
            raise ConfigError(
                f"--tensor_parallel: found {t}, expected a divisor of the model's {config.num_key_value_heads} "
                "key/value heads."
            )
        for _, path, linear in projections(shape):
            _, o = parts(path, self)
            if linear.out_features % o:
                raise ConfigError(
                    f"--fsdp: the {linear.out_features} outputs of {path} are not split evenly over {o} cards. Use a "
                    "power of two."
                )
            if t > 1 and path.endswith(ROWS) and not cuts_rows(linear, t):
                found = f"{t} parts of the {linear.in_features} inputs of {path} are not whole groups"
                if linear.quant and linear.quant.act_order:
                    found = f"the groups of {path} lie in no order (act-order), so that no part of its inputs is whole"
                raise ConfigError(f"--tensor_parallel: {found}. Use a smaller --tensor_parallel; 1 always works.")


ONE_DEVICE = Layout()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a training step.

    Attributes:
        batch: rows that a device computes at once; with ``tensor`` devices to a model, all these have the same rows.
        length: tokens of a row.
        accumulate: batches summed up before an update.
        rank: of the adapters.
        recompute: what the backward pass computes again, see :meth:`lotaqaf_jax.models.Decoder.hidden_states`.
        method: "lota" (int8 adapters), "lora" or "qalora" (float32).
        optimizer: "ternary_adam", "t_signsgd", or "adamw", that of the baselines.
        beta: whether t-SignSGD averages gradients.
        target_modules: the projections with adapters.
        float8: whether dW' is a product of float8 numbers, where the card is given for it.
        packing: whether a row may hold several examples, which takes a mask.
        itemsize: bytes of the type that is computed in.
    """

    batch: int = 8
    length: int = 1024
    accumulate: int = 1
    rank: int = 64
    recompute: Recompute = "block"
    method: Literal["lota", "lora", "qalora"] = "lota"
    optimizer: Literal["ternary_adam", "t_signsgd", "adamw"] = "ternary_adam"
    beta: bool = False
    target_modules: tuple[str, ...] = TARGET_MODULES
    float8: bool = True
    packing: bool = False
    itemsize: int = 2

    def __post_init__(self) -> None:
        for name in ("batch", "length", "accumulate", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: found {getattr(self, name)}, expected 1 or more.")
        check_targets(self.target_modules)

    @property
    def tokens(self) -> int:
        """Tokens that a device computes at once."""
        return self.batch * self.length


def projections(shape: Shape) -> Iterator[tuple[int, str, LinearSpec]]:
    """(layers that have it, its path, the weight) of every projection of every run of layers that look alike."""
    for start, count in shape.spec.runs():
        for path, linear in shape.spec.layers[start]:
            yield count, path, linear


def parts(path: str, layout: Layout) -> tuple[int, int]:
    """(parts of the inputs, parts of the outputs) that a weight at ``path`` is held in: ``out`` is split over fsdp, and
    over tensor either ``in`` (:data:`ROWS`) or ``out``; the head, ``lm_head``, along its outputs, the vocabulary."""
    if path.endswith(ROWS):
        return layout.tensor, layout.fsdp
    return 1, layout.fsdp * layout.tensor


def _part(size: int, ways: int) -> int:
    return -(-size // ways)


def weight_bytes(linear: LinearSpec, path: str, layout: Layout) -> dict[str, int]:
    """Bytes of one layer's weight on a device.

        words   packed_size(in, bits) / i * out / o * 4
        scales  groups / i * out / o * their type;   zeros  groups / i * out / o
        dense   in / i * out / o * type of a weight that is not quantised, a bias, and the int32 of act-order

    with i and o of :func:`parts`, and every quotient rounded up. Biases and act-order are on every device.
    """
    i, o = parts(path, layout)
    out = _part(linear.out_features, o)
    held = {"words": 0, "scales": 0, "zeros": 0, "dense": 0}
    if linear.bias:
        held["dense"] += linear.out_features * jnp.dtype(linear.bias_dtype).itemsize
    size = jnp.dtype(linear.dtype).itemsize
    if linear.quant is None:
        held["dense"] += _part(linear.in_features, i) * out * size
        return held
    groups = _part(group_count(linear.in_features, linear.quant.group_size), i)
    held["words"] = _part(packed_size(linear.in_features, linear.quant.bits), i) * out * 4
    held["scales"], held["zeros"] = groups * out * size, groups * out
    held["dense"] += 4 * linear.in_features if linear.quant.act_order else 0
    return held


def adapter_values(linear: LinearSpec, path: str, settings: Settings, layout: Layout) -> int:
    """Values of A and B of one layer on a device; 0 where the projection has no adapters.

        rows / (fsdp * i) * rank  +  rank * out / o

    with rows = in, or for QA-LoRA the number of groups, i and o of :func:`parts`, and quotients rounded up. A is split
    along ``in`` over fsdp as well. Adapters that change a weight need a quantised one.
    """
    if path.split(".")[-1] not in settings.target_modules:
        return 0
    if linear.quant is None and settings.method != "lora":
        return 0
    rows = linear.in_features
    if settings.method == "qalora" and linear.quant is not None:
        rows = group_count(rows, linear.quant.group_size)
    i, o = parts(path, layout)
    return (_part(rows, layout.fsdp * i) + _part(linear.out_features, o)) * settings.rank


def largest_layer(shape: Shape, layout: Layout) -> int:
    """Values of the weights of one layer on a device while it is computed, gathered over fsdp: of the largest layer."""
    return max(
        sum(math.prod(_gathered(linear, path, layout)) for path, linear in shape.spec.layers[start])
        for start, _ in shape.spec.runs()
    )


def largest_weight(shape: Shape, layout: Layout) -> int:
    """Values of the largest weight on a device, gathered over fsdp."""
    return max(math.prod(_gathered(linear, path, layout)) for _, path, linear in projections(shape))


def _gathered(linear: LinearSpec, path: str, layout: Layout) -> tuple[int, int]:
    i, o = parts(path, gathered(layout))
    return _part(linear.in_features, i), _part(linear.out_features, o)


def gathered(layout: Layout) -> Layout:
    """The layout of a weight in use: whole over fsdp."""
    return Layout(tensor=layout.tensor)


def table_values(shape: Shape, layout: Layout) -> int:
    """Values of the embedding, or of the head, on a device: vocab / (fsdp * tensor) * hidden."""
    return _part(shape.config.vocab_size, layout.fsdp * layout.tensor) * shape.config.hidden_size
