"""Seconds of a training step, by part.

The constants were fitted to one profile: Qwen2.5-14B in 4 bit, group 64, rank 64, 8 x 1024 tokens on an H200
(docs/benchmarks.md, "What bounds it"). For other cards they are multiplied by data-sheet figures, which is an estimate;
nothing of what passes between cards was measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from lotaqaf_jax.models.spec import LinearSpec
from lotaqaf_jax.parallel.rules import ROWS
from lotaqaf_jax.plan.hardware import Gpu
from lotaqaf_jax.plan.memory import saved_bytes
from lotaqaf_jax.plan.sizes import (
    ONE_DEVICE,
    Layout,
    Settings,
    Shape,
    adapter_values,
    gathered,
    parts,
    projections,
    weight_bytes,
)

__all__ = ["Seconds", "seconds_of"]

PRODUCT_SHARE = 0.71
"""Of the peak: 700 of 989 TFLOP/s in bfloat16, where the card's power bounds them; 1,400 of 1,979 in float8."""
ATTENTION_SHARE = 0.30
"""Of the peak, cuDNN's causal attention over 1,024 tokens, forward and backward: 18.6 TFLOP in 0.063 s."""
MEMORY_SHARE = 0.62
"""Of the memory's bandwidth, elementwise work, copies and what reads dW': 266 GB in 0.087 s, 126 GB in 0.042 s."""
WEIGHTS_SHARE = 0.37
"""The same of making weights from packed words, which instructions bound: 67 GB in 0.038 s."""
LINK_SHARE = 0.75
"""Of links and networks. An assumption."""
LATENCY = 20e-6
"""Seconds that a collective takes however small it is. An assumption."""

UPDATE_BYTES = {"ternary_adam": 30, "t_signsgd": 84, "adamw": 28}
"""Bytes read and written for an adapter value: ternary_adam reads gradient, latent and two averages, 16, and the value,
and writes all but the gradient, 13; AdamW likewise with no latent and a float value; t-SignSGD's is fitted, 7.8 ms for
275 million values, which it reads many times to find its thresholds."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one update on one device: ``forward``, ``backward`` and ``again`` (recomputation) are the matrix products of
    the layers, ``weights`` making W' from packed words, ``attention``, ``elementwise`` norms, rotary embedding, the MLP
    between its products and copies of what is kept, ``gradients`` from dW' to A and B, rounding to float8 included,
    ``loss`` the head with the loss, ``update`` the optimizer, and ``communication`` what waits for other devices."""

    forward: float
    backward: float
    again: float
    weights: float
    attention: float
    elementwise: float
    gradients: float
    loss: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(dataclasses.astuple(self))

    def parts(self) -> Iterator[tuple[str, float]]:
        """(name, seconds) of every part."""
        yield from dataclasses.asdict(self).items()


def seconds_of(shape: Shape, gpu: Gpu, settings: Settings, layout: Layout = ONE_DEVICE) -> Seconds:
    """The time of an update: ``settings.accumulate`` times that of a batch, and the optimizer's.

    Args:
        shape: the model.
        gpu: the card.
        settings: of the step.
        layout: how it is spread over devices.

    Raises:
        ConfigError: the model cannot be split so.
    """
    layout.check(shape)
    card = _Card(gpu, settings)
    forward, dx, dw, again = _products(shape, card, settings, layout)
    weights = _weights(shape, card, settings, layout)
    attention = _attention(shape, card, settings, layout)
    elementwise = _elementwise(shape, card, settings, layout)
    gradients = _gradients(shape, card, settings, layout)
    loss = _loss(shape, card, settings, layout)
    values = sum(count * adapter_values(linear, path, settings, layout) for count, path, linear in projections(shape))
    computing = forward + dx + dw + again + weights + attention + elementwise + gradients
    n = settings.accumulate
    return Seconds(
        forward=n * forward,
        backward=n * (dx + dw),
        again=n * again,
        weights=n * weights,
        attention=n * attention,
        elementwise=n * elementwise,
        gradients=n * gradients,
        loss=n * loss,
        update=card.moving(values * (UPDATE_BYTES[settings.optimizer] + 20)),  # 20: averaged, squared, cast
        communication=n * _communication(shape, gpu, settings, layout, computing),
    )


@dataclasses.dataclass(frozen=True)
class _Card:
    """What a card reaches."""

    gpu: Gpu
    settings: Settings

    def moving(self, size: float, share: float = MEMORY_SHARE) -> float:
        """Seconds for reading and writing ``size`` bytes."""
        return size / (share * self.gpu.bandwidth)

    def multiplying(self, operations: float, share: float = PRODUCT_SHARE) -> float:
        """Seconds for products in the type computed in; float32 is TF32, half as fast as bfloat16."""
        return operations / (share * self.gpu.flops * 2 / self.settings.itemsize)

    @property
    def float8(self) -> bool:
        """Whether dW' comes from float8 numbers: LoTA-QAF's in bfloat16, on cards for it."""
        of_method = self.settings.method == "lota" and self.settings.itemsize == 2
        return self.settings.float8 and of_method and self.gpu.flops8 is not None


def _values(linear: LinearSpec, path: str, layout: Layout) -> int:
    """Of one weight, on one device while it is in use."""
    i, o = parts(path, gathered(layout))
    return -(-linear.in_features // i) * -(-linear.out_features // o)


def _products(shape: Shape, card: _Card, settings: Settings, layout: Layout) -> tuple[float, float, float, float]:
    """x @ W' of all layers; dx = dy @ W'.T; dW' = x.T @ dy, LoTA-QAF's alone; and what is computed again.

        2 * tokens * in * out / t operations each, at least the time to read the weight

    "block" computes all again but each block's last product, whose result nobody needs. LoRA has 2 * tokens *
    (in + out) * rank operations more, and twice that in its backward pass.
    """
    forward = dw = again = lora = 0.0
    for count, path, linear in projections(shape):
        values = _values(linear, path, layout)
        operations = 2 * settings.tokens * values
        reading = card.moving(settings.itemsize * values)
        one = count * max(card.multiplying(operations), reading)
        forward += one
        again += 0 if path.endswith("down_proj") else one
        if adapted := adapter_values(linear, path, settings, gathered(layout)):
            if settings.method == "lora":
                lora += card.multiplying(count * 2 * settings.tokens * adapted)
            elif settings.method == "lota" and card.float8 and card.gpu.flops8:
                dw += count * max(operations / (PRODUCT_SHARE * card.gpu.flops8), reading)
            elif settings.method == "lota":
                dw += one
    dx, dw, forward = forward + lora, dw + lora, forward + lora
    return forward, dx, dw, again if settings.recompute == "block" else 0.0


def _weights(shape: Shape, card: _Card, settings: Settings, layout: Layout) -> float:
    """W' is made twice, in the forward pass and again: c + bits / 8 bytes a value, and its group's scale and zero."""
    size = 0.0
    for count, path, linear in projections(shape):
        if linear.quant is not None:
            held = weight_bytes(linear, path, gathered(layout))
            read = held["words"] + held["scales"] + held["zeros"]
            size += 2 * count * (settings.itemsize * _values(linear, path, layout) + read)
    return card.moving(size, WEIGHTS_SHARE)


def _attention(shape: Shape, card: _Card, settings: Settings, layout: Layout) -> float:
    """Half of 4 * tokens * length * heads * head_dim operations, 2.5 times that in the backward pass, and once more
    where it is recomputed."""
    config = shape.config
    width = -(-config.num_attention_heads // layout.tensor) * config.head_dim
    once = 2 * settings.tokens * settings.length * width * config.num_hidden_layers
    passes = 3.5 if settings.recompute == "none" else 4.5
    return card.multiplying(passes * once, ATTENTION_SHARE)


def _elementwise(shape: Shape, card: _Card, settings: Settings, layout: Layout) -> float:
    """layers * tokens * c * ((28 h + 8 m) + (9 h + 3 m) where it is recomputed) bytes, with m of one device: two norms,
    rotary embedding, sums of the stream, silu(gate) * up, and their gradients; and 4 times what is kept, which is
    written to its stack and read from it, each a copy."""
    config = shape.config
    m = -(-config.intermediate_size // layout.tensor)
    values = 28 * config.hidden_size + 8 * m
    if settings.recompute != "none":
        values += 9 * config.hidden_size + 3 * m
    size = config.num_hidden_layers * settings.tokens * settings.itemsize * values
    return card.moving(size + 4 * saved_bytes(shape, settings, layout))


def _gradients(shape: Shape, card: _Card, settings: Settings, layout: Layout) -> float:
    """dW' is read twice, 2 * c * values bytes, for two products of 2 * values * rank operations; and for float8, x and
    dy are read and written smaller, tokens * (in + out) * (c + 1) bytes. Only LoTA-QAF has dW'."""
    if settings.method != "lota":
        return 0.0
    size = operations = 0.0
    for count, path, linear in projections(shape):
        if adapter_values(linear, path, settings, layout):
            values = _values(linear, path, layout)
            size += count * 2 * settings.itemsize * values
            operations += count * 4 * values * settings.rank
            if card.float8:
                i, o = parts(path, gathered(layout))
                sides = -(-linear.in_features // i) + -(-linear.out_features // o)
                size += count * settings.tokens * sides * (settings.itemsize + 1)
    return card.moving(size) + card.multiplying(operations)


def _loss(shape: Shape, card: _Card, settings: Settings, layout: Layout) -> float:
    """The logits and the gradient at the hidden states, 4 * tokens * vocab / t * hidden operations; the logits, 4
    bytes, are written, read twice, and their gradient written and read in 2."""
    logits = settings.tokens * -(-shape.config.vocab_size // layout.tensor)
    return card.multiplying(4 * logits * shape.config.hidden_size) + card.moving(16 * logits)


def _communication(shape: Shape, gpu: Gpu, settings: Settings, layout: Layout, computing: float) -> float:
    """Seconds of a batch that devices wait for each other.

    * fsdp, for every layer and pass (two, and one more for "block"): packed words, scales, zeros and float32 adapters
      are gathered. The compiler can hide a gather behind earlier products of the same layer, not of the layer before: a
      pass waits for the share of its first weight, taken to be the largest one's, or for what is longer than its
      computing.
    * tensor, for every layer: the stream is summed twice in the forward pass and twice in the backward pass, and once
      more for "block"; nothing hides that. The embedding and the head add two sums; A where ``out`` is split and B
      where ``in`` is have their gradients summed too.
    * adapter gradients, float32, are summed over fsdp (each device keeping its part) and over data.
    * embedding and head are gathered over fsdp.

    n devices gather S bytes in (n - 1) / n * S / bandwidth, and sum them in twice that.
    """
    if layout.count == 1:
        return 0.0
    config, c, t = shape.config, settings.itemsize, layout.tensor
    along = {
        "tensor": _Ring(gpu, t, 1),
        "fsdp": _Ring(gpu, layout.fsdp, t),
        "data": _Ring(gpu, layout.data, t * layout.fsdp),
    }
    passes = 3 if settings.recompute == "block" else 2
    whole = gathered(layout)
    taken = waited = 0.0
    packed: dict[str, float] = {}
    for count, path, linear in projections(shape):
        held = sum(weight_bytes(linear, path, whole).values())
        packed[path] = packed.get(path, 0.0) + count * (held + 4 * adapter_values(linear, path, settings, whole))
        gradients = 4 * adapter_values(linear, path, settings, whole)
        waited += count * along["fsdp"].gather(gradients)
        waited += count * along["data"].add(4 * adapter_values(linear, path, settings, layout))
        # Half of a weight's adapters are not split over tensor: B of ROWS, A of the others.
        side = linear.out_features if path.endswith(ROWS) else linear.in_features
        waited += count * along["tensor"].add(4 * side * settings.rank if gradients else 0)
    layers = config.num_hidden_layers
    taken = passes * along["fsdp"].gather(sum(packed.values()), len(packed) * layers)
    first = max(packed.values()) / sum(packed.values())
    waited += max(first * taken, taken - computing)
    stream = settings.tokens * config.hidden_size * c
    sums = layers * (5 if settings.recompute == "block" else 4) + 2
    waited += sums * along["tensor"].add(stream)
    tables = 1 if shape.spec.head is None else 2
    table = -(-config.vocab_size // t) * config.hidden_size * jnp.dtype(shape.spec.embed_dtype).itemsize
    return waited + tables * along["fsdp"].gather(table)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """``size`` devices, ``stride`` apart, that gather or add up. Where they are on several hosts, each host's members
    send through a network adapter of their own."""

    gpu: Gpu
    size: int
    stride: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        members = max(1, self.gpu.host // self.stride)
        reached = self.gpu.link if self.size <= members else min(self.gpu.link, members * self.gpu.network)
        return LINK_SHARE * reached

    def gather(self, size: float, calls: int = 1) -> float:
        """Seconds until every device has all of ``size`` bytes, of which each had a part."""
        if self.size == 1 or not size:
            return 0.0
        return size * (self.size - 1) / self.size / self.bandwidth + calls * LATENCY * math.log2(self.size)

    def add(self, size: float) -> float:
        """Seconds until every device has the sum of ``size`` bytes of all."""
        return 2 * self.gather(size)
