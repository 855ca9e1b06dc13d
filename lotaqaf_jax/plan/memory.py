"""Bytes of a training step on one device, by part.

What is held from step to step is counted exactly. What a step adds is counted from the model's equations: the arrays
that JAX keeps for the backward pass, and those that a layer's backward pass makes. It was compared with measured peaks,
see docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from lotaqaf_jax.plan.sizes import (
    ONE_DEVICE,
    Layout,
    Settings,
    Shape,
    adapter_values,
    gathered,
    largest_layer,
    largest_weight,
    projections,
    table_values,
    weight_bytes,
)

__all__ = ["LOSS_VALUES", "RESERVE", "Held", "Memory", "Phase", "held_bytes", "memory_of", "saved_bytes"]

LOSS_VALUES = 2**26
"""Logits that the loss makes at once; lotaqaf_jax.training.loss has the same number."""

RESERVE = 0.08
"""Share of the memory that is left for fragments; lotaqaf_jax.training.compilation leaves as much."""

OPTIMIZER_BYTES = {"ternary_adam": 12, "t_signsgd": 0, "adamw": 8}
"""Bytes of the optimizer's state for every adapter value: latent and two averages; none; two averages."""


@dataclasses.dataclass(frozen=True)
class Held:
    """What is held from step to step, in bytes: ``dense`` are weights that are not quantised, biases, norms and the
    index of act-order, ``embeddings`` the embedding and the head."""

    words: int
    scales: int
    zeros: int
    dense: int
    embeddings: int
    adapters: int
    optimizer: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a step adds at its peak, in bytes: ``floats`` the float32 copy of int8 adapters at which gradients are
    taken, ``gradients`` those of the adapters, ``saved`` what is kept for the backward pass, and ``working`` what the
    phase itself makes: of the largest layer, of a chunk of logits, or of the update. ``name`` is the phase."""

    name: str
    floats: int
    gradients: int
    saved: int
    working: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.floats + self.gradients + self.saved + self.working


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device: what is held, what the step adds in the phase that takes most, and the reserve."""

    held: Held
    peak: Phase

    @property
    def needed(self) -> int:
        """The peak of the bytes in use."""
        return self.held.total + self.peak.total

    @property
    def reserve(self) -> int:
        """For fragments: a share :data:`RESERVE` of everything together."""
        return round(self.needed * RESERVE / (1 - RESERVE))

    @property
    def total(self) -> int:
        """What has to be there."""
        return self.needed + self.reserve

    def parts(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every part, those above in order; they sum up to :attr:`total`."""
        for part in (self.held, self.peak):
            for field in dataclasses.fields(part):
                if field.name != "name":
                    yield field.name, getattr(part, field.name)
        yield "reserve", self.reserve


def memory_of(shape: Shape, settings: Settings, layout: Layout = ONE_DEVICE) -> Memory:
    """The bytes of a step on one device.

    The peak is the largest of three phases:

        loss      floats + saved + a chunk of logits, the head in use, and the gradient at the hidden states
        backward  floats + gradients + saved + the largest layer's arrays
        update    gradients + three float32 arrays of the adapters' size

    with one set of gradients more where batches are summed up.

    Args:
        shape: the model.
        settings: of the step.
        layout: how it is spread over devices.

    Raises:
        ConfigError: the model cannot be split so.
    """
    layout.check(shape)
    values = _adapter_values(shape, settings, layout)
    floats = 4 * values if settings.method == "lota" else 0  # the others are floats at rest
    once, summed = 4 * values, 4 * values if settings.accumulate > 1 else 0
    saved = saved_bytes(shape, settings, layout)
    phases = (
        Phase("loss", floats, summed, saved, _loss_bytes(shape, settings, layout)),
        Phase("backward", floats, once + summed, saved, _layer_bytes(shape, settings, layout)),
        Phase("update", 0, once, 0, 12 * values),
    )
    return Memory(held_bytes(shape, settings, layout), max(phases, key=lambda phase: phase.total))


def _adapter_values(shape: Shape, settings: Settings, layout: Layout) -> int:
    return sum(count * adapter_values(linear, path, settings, layout) for count, path, linear in projections(shape))


def held_bytes(shape: Shape, settings: Settings, layout: Layout = ONE_DEVICE) -> Held:
    """What is held from step to step, exactly: :func:`weight_bytes` of all layers, the embedding and the head over fsdp
    and tensor, norms on every device; an adapter value in int8 with one float32 threshold a weight, or in float32; and
    the optimizer's state, :data:`OPTIMIZER_BYTES` a value.

    t-SignSGD has 4 where it averages gradients.
    """
    config, spec = shape.config, shape.spec
    weights = {"words": 0, "scales": 0, "zeros": 0, "dense": 0}
    adapters = values = 0
    for count, path, linear in projections(shape):
        for part, size in weight_bytes(linear, path, layout).items():
            weights[part] += count * size
        if found := adapter_values(linear, path, settings, layout):
            values += count * found
            adapters += count * (found + 4 if settings.method == "lota" else 4 * found)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    weights["dense"] += norms * jnp.dtype(spec.norm_dtype).itemsize
    embeddings = table_values(shape, layout) * jnp.dtype(spec.embed_dtype).itemsize
    if spec.head is not None:
        embeddings += sum(weight_bytes(spec.head, "lm_head", layout).values())
    state = 4 if settings.optimizer == "t_signsgd" and settings.beta else OPTIMIZER_BYTES[settings.optimizer]
    return Held(**weights, embeddings=embeddings, adapters=adapters, optimizer=state * values)


def saved_bytes(shape: Shape, settings: Settings, layout: Layout = ONE_DEVICE) -> int:
    """What is kept of all layers for the backward pass: layers * tokens * the bytes of a token.

    With h the stream, q and k the widths of queries and keys, m that of the MLP, c the bytes of the type computed in, t
    the devices of ``tensor``:

        block     c * h                                    a block's input
        products  c * (2 h + (q + 2 k + 2 m) / t)          and the outputs of q, k, v, o, gate and up
        none      :func:`_kept_of_layer`, for which c * h is one of the norms' inputs

    That of the last projection of a block is not needed again. Source: the arrays that JAX saves.
    """
    config, c = shape.config, settings.itemsize
    h, q, k, m = _widths(shape, layout)
    if settings.recompute == "none":
        return config.num_hidden_layers * _kept_of_layer(shape, settings, layout)
    values = h if settings.recompute == "block" else 2 * h + q + 2 * k + 2 * m
    return config.num_hidden_layers * settings.tokens * c * values


def _widths(shape: Shape, layout: Layout) -> tuple[int, int, int, int]:
    """h, and q, k, m of one device."""
    config, t = shape.config, layout.tensor
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size, -(-q // t), -(-k // t), -(-config.intermediate_size // t)


def _kept_of_layer(shape: Shape, settings: Settings, layout: Layout) -> int:
    """What one layer's backward pass needs where nothing is recomputed, widths as in :func:`saved_bytes`:

        tokens * (c * (2 h + 2 q + 2 k + 6 m) + 4 * 2 h)

    two normed streams, the rotated queries, what they gather, rotated keys, values, and six arrays of the MLP; and two
    norms' inputs in float32. In float32 there is no flash attention: scores and probabilities, both float32, beside it.
    """
    h, q, k, m = _widths(shape, layout)
    kept = settings.tokens * (settings.itemsize * (2 * h + 2 * q + 2 * k + 6 * m) + 8 * h)
    if settings.itemsize == 4:
        kept += 8 * settings.batch * -(-shape.config.num_attention_heads // layout.tensor) * settings.length**2
    return kept


def _layer_bytes(shape: Shape, settings: Settings, layout: Layout) -> int:
    """What the backward pass of one layer makes:

        what it needs, computed again (not for "none")   :func:`_kept_of_layer`
        gradients of gate, up and the stream             tokens * c * (2 m + h)
        W' in use                                        c * the layer's values for "block", else the largest weight's
        dW', and x and dy in float8                      c * the largest weight's values + tokens * (h + m)
        words and adapters of the layer                  sliced out of the stack, gathered over fsdp; adapters float32
        a mask, for packed rows                          batch * length**2 * (c + 1)

    dW' is LoTA-QAF's alone.
    """
    c, tokens = settings.itemsize, settings.tokens
    h, _, _, m = _widths(shape, layout)
    whole = gathered(layout)
    total = 0 if settings.recompute == "none" else _kept_of_layer(shape, settings, layout)
    total += tokens * c * (2 * m + h)
    total += c * (largest_layer if settings.recompute == "block" else largest_weight)(shape, layout)
    if settings.method == "lota":
        total += c * largest_weight(shape, layout) + (tokens * (h + m) if settings.float8 else 0)
    total += max(
        sum(
            sum(weight_bytes(linear, path, whole).values()) + 4 * adapter_values(linear, path, settings, whole)
            for path, linear in shape.spec.layers[start]
        )
        for start, _ in shape.spec.runs()
    )
    if settings.packing:
        total += settings.batch * settings.length**2 * (c + 1)
    return total


def _loss_bytes(shape: Shape, settings: Settings, layout: Layout) -> int:
    """What the loss makes, with n = min(tokens, LOSS_VALUES / vocab) positions at once:

    logits, their gradient, and that rounded   n * vocab / t * (4 + 4 + c)
    last hidden states and their gradient      2 * tokens * h * c
    the head, gathered over fsdp               vocab / t * h * its type, where fsdp > 1
    the head in the type computed in           vocab / t * h * c, where it is held in another
    """
    config, c, spec = shape.config, settings.itemsize, shape.spec
    n = min(settings.tokens, max(1, LOSS_VALUES // config.vocab_size))
    vocab = -(-config.vocab_size // layout.tensor)
    total = n * vocab * (8 + c) + 2 * settings.tokens * config.hidden_size * c
    if spec.head is None or spec.head.quant is None:
        held = jnp.dtype(spec.embed_dtype if spec.head is None else spec.head.dtype)
        if layout.fsdp > 1:
            total += vocab * config.hidden_size * held.itemsize
        # float16 and bfloat16 are of one size and not of one type; what is computed in 2 bytes is bfloat16.
        if held != (jnp.bfloat16 if c == 2 else jnp.float32):
            total += vocab * config.hidden_size * c
    else:
        total += vocab * config.hidden_size * c
    return total
