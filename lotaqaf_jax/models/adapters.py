"""Adapters on a decoder, of LoTA-QAF and of the methods it is compared with: add them, merge them, count."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lotaqaf_jax.errors import AdapterError, ConfigError
from lotaqaf_jax.kernels import AnyAdapter, LowRank, TernaryAdapter, WeightAdapter, merge_adapter, merge_and_count
from lotaqaf_jax.kernels.sharded import merge_stack
from lotaqaf_jax.kernels.sharding import MatrixSharding
from lotaqaf_jax.models.decoder import Decoder
from lotaqaf_jax.models.layers import Linear
from lotaqaf_jax.models.spec import PROJECTIONS
from lotaqaf_jax.quant.weight import QuantizedWeight
from lotaqaf_jax.ternary import Offset, Surrogate, check_settings, init_adapter
from lotaqaf_jax.thresholds import check_share, omega_of_share

__all__ = [
    "TARGET_MODULES",
    "AdapterStatistics",
    "MoveCounts",
    "adapted_linears",
    "adapter_statistics",
    "add_adapters",
    "check_targets",
    "count_moves",
    "init_stack",
    "linears",
    "merge",
    "moved_shares",
    "offset_type",
    "with_adapters",
    "with_omegas",
]

TARGET_MODULES = tuple(path.split(".")[1] for path in PROJECTIONS)


def linears(model: Decoder) -> Iterator[tuple[list[str], Linear]]:
    """Every projection of a decoder with the full names of the layers stacked in it.

    Yields:
        (["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", ...], linear); the output head is not among them.
    """
    for segment, (start, count) in zip(model.segments, model.spec.runs(), strict=True):
        for path in PROJECTIONS:
            yield [f"model.layers.{i}.{path}" for i in range(start, start + count)], segment.linear(path)


def adapted_linears(model: Decoder) -> Iterator[tuple[list[str], Linear, AnyAdapter]]:
    """Those of :func:`linears` that have adapters, with the adapters."""
    for names, linear in linears(model):
        if linear.adapters is not None:
            yield names, linear, linear.adapters


def _mergeable(model: Decoder) -> Iterator[tuple[list[str], Linear, WeightAdapter]]:
    """Those of :func:`adapted_linears` whose adapters are in the weight."""
    for names, linear, adapter in adapted_linears(model):
        if not isinstance(adapter, LowRank):
            yield names, linear, adapter


def _shallow_copy(model: Decoder) -> Decoder:
    """Another module over the same arrays."""
    return nnx.merge(*nnx.split(model), copy=True)


def check_targets(target_modules: Sequence[str]) -> None:
    """Check names of projections to adapt.

    Raises:
        ConfigError: none, or one that is not of :data:`TARGET_MODULES`.
    """
    if not target_modules:
        raise ConfigError(f"target_modules: none given; expected some of {', '.join(TARGET_MODULES)}.")
    unknown = sorted(set(target_modules) - set(TARGET_MODULES))
    if unknown:
        raise ConfigError(
            f"target_modules: {', '.join(unknown)} not known; expected some of {', '.join(TARGET_MODULES)}."
        )


def add_adapters(
    model: Decoder,
    rank: int = 64,
    omega: float | None = None,
    offset: Offset = "reference",
    target_modules: Sequence[str] = TARGET_MODULES,
    *,
    seed: int = 0,
    offset_dtype: Any = jnp.float32,
    float8: bool = False,
    surrogate: Surrogate = "straight",
) -> Decoder:
    """Put fresh ternary adapters on the quantised projections of ``model``; its output stays the same bit for bit.

    Args:
        model: a decoder with packed weights, without adapters.
        rank: inner size of the adapters.
        omega: threshold; None for the published 0.75 * rank. :func:`with_omegas` gives every matrix its own.
        offset: "reference", "paper" or "none"; see :mod:`lotaqaf_jax.ternary`.
        target_modules: names of the projections to adapt, of :data:`TARGET_MODULES`. A projection that is held in
            16 bit has no integers to move and is passed over.
        seed: each adapter depends on this and on its module's name alone.
        offset_dtype: the type mu will be stored in: float32, bfloat16 or float16.
        float8: take the adapters' gradients from a product of numbers of 8 bits, see
            :mod:`lotaqaf_jax.kernels.float8`; where activations are bfloat16.
        surrogate: how the gradient passes the threshold, "straight" or "window"; see
            :func:`lotaqaf_jax.ternary.adapter_gradients`.

    Returns:
        A new model over the same weights, with int8 adapters.

    Raises:
        ConfigError: rank, omega, offset or its type out of range, an unknown target, or nothing to adapt.
        AdapterError: the model has adapters already, or a merged offset.
    """
    omega = 0.75 * rank if omega is None else omega
    check_settings(rank, omega, offset, surrogate)
    dtype = offset_type(offset_dtype)

    def fresh(linear: Linear, labels: np.ndarray) -> TernaryAdapter:
        a, b = init_stack(init_adapter, seed, labels, *linear.packed.shape, rank)
        omegas = jnp.full(len(labels), omega, jnp.float32)
        return TernaryAdapter(a, b, omegas, offset, dtype, float8=float8, surrogate=surrogate)

    return with_adapters(model, target_modules, fresh)


def with_adapters(
    model: Decoder,
    target_modules: Sequence[str],
    fresh: Callable[[Linear, np.ndarray], AnyAdapter],
    *,
    beside: bool = False,
) -> Decoder:
    """A new model over the same weights with adapters: those that ``fresh`` makes for a linear and its modules' labels.

    ``beside`` says that they are beside the weight, which may then be dense or have an offset.
    """
    check_targets(target_modules)
    _check_unadapted(model, beside)
    model = _shallow_copy(model)
    adapted = 0
    for names, linear in linears(model):
        if names[0].rsplit(".", 1)[1] not in target_modules or not (beside or linear.is_quantized):
            continue
        labels = np.asarray([zlib.crc32(name.encode()) for name in names], np.uint32)
        make: Callable[[], AnyAdapter] = functools.partial(fresh, linear, labels)
        if linear.sharding is not None:  # The same values, made where they are to lie.
            make = jax.jit(make, out_shardings=linear.adapter_shardings(jax.eval_shape(make)))
        linear.set_adapters(make())
        adapted += len(names)
    if not adapted:
        raise ConfigError(
            f"target_modules: none of {', '.join(target_modules)} is quantised in this model, so there are no integers "
            "to move. Pass a GPTQ checkpoint."
        )
    return model


def with_omegas(model: Decoder, share: float | jax.Array) -> Decoder:
    """Set the threshold of every matrix with ternary adapters so that ``share`` of the entries of A @ B pass it.

    Args:
        model: a decoder with adapters.
        share: in (0, 1), or a traced number; see :func:`lotaqaf_jax.thresholds.omega_of_share`.

    Returns:
        A new model over the same arrays, with other thresholds; adapters that are not ternary stay as they are.

    Raises:
        ConfigError: a share out of range.
    """
    if not isinstance(share, jax.Array):
        check_share(share)
    model = _shallow_copy(model)
    for _, linear, adapter in adapted_linears(model):
        if isinstance(adapter, TernaryAdapter):
            linear.set_adapters(dataclasses.replace(adapter, omega=omega_of_share(adapter.a, adapter.b, share)))
    return model


def offset_type(offset_dtype: Any) -> Any:
    """The type of mu, checked.

    Raises:
        ConfigError: none of float32, bfloat16 and float16.
    """
    names = [jnp.dtype(kind).name for kind in (jnp.float32, jnp.bfloat16, jnp.float16)]
    try:
        dtype = jnp.dtype(offset_dtype)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in names:
        found = repr(offset_dtype) if dtype is None else dtype.name
        raise ConfigError(f"offset_dtype: found {found}, expected one of {', '.join(names)}.")
    return dtype


def _check_unadapted(model: Decoder, beside: bool) -> None:
    for names, linear in linears(model):
        if linear.adapters is not None:
            raise AdapterError(f"{names[0]} has adapters already; merge them, or start again from the checkpoint.")
        if not beside and linear.is_quantized and linear.packed.offset is not None:
            raise AdapterError(
                f"{names[0]} holds the offset of an earlier merge, which further adapters would replace. Start "
                "from the checkpoint as it was before the merge."
            )


def merge(model: Decoder, *, donate: bool = False) -> Decoder:
    """Take the adapters into the packed weights: integers move by at most one step, mu becomes the weight's offset.

    Nothing is rounded: the merged model's logits equal those of ``model`` bit for bit.

    Args:
        model: a decoder with adapters.
        donate: put the new words where those of ``model`` are, which cannot be used any more; without, there is memory
            for both.

    Returns:
        A new model without adapters, its weights of the same size. QA-LoRA's adapters leave the integers as they are
        and become the offset alone.

    Raises:
        ConfigError: the model has no adapters.
        AdapterError: they are LoRA's, which no integers and no offset hold.
    """
    model = _shallow_copy(model)
    adapted = list(adapted_linears(model))
    if not adapted:
        raise ConfigError("the model has no adapters to merge; call add_adapters first.")
    for names, linear, adapter in adapted:
        if isinstance(adapter, LowRank):
            raise AdapterError(
                f"{names[0]} has LoRA adapters, whose product lies on no grid of integers: merged, it would be rounded "
                "again. Save them with convert.save_adapter and serve them beside the model."
            )
        # The words apart from the rest, which the new weight shares with the old.
        words: Any = None
        rest = dataclasses.replace(linear.packed, qweight=words)
        merged = _merge_stack_in_place if donate else _merge_stack
        words, mu = merged(linear.packed.qweight, rest, adapter, linear.sharding)
        linear.weight.set_value(dataclasses.replace(rest, qweight=words, offset=mu))
        linear.set_adapters(None)
    return model


@dataclasses.dataclass(frozen=True)
class AdapterStatistics:
    """What the adapters of one module do: ``moved`` of its ``integers`` move, and ``mu`` is the sum of |mu| over its
    ``offsets`` groups and columns, in steps of the grid."""

    moved: int
    integers: int
    mu: float
    offsets: int


MoveCounts = list[tuple[jax.Array, jax.Array]]
"""For every module of :func:`adapted_linears` the integers that move and the sum of |mu|, each (layers,); none for
LoRA's adapters, which change neither."""


def count_moves(model: Decoder) -> MoveCounts:
    """Queue the counting on the device and return without waiting for it; :func:`adapter_statistics` reads it."""
    return [_count_stack(linear.packed, adapter, linear.sharding) for _, linear, adapter in _mergeable(model)]


def adapter_statistics(model: Decoder, counts: MoveCounts | None = None) -> dict[str, AdapterStatistics]:
    """:class:`AdapterStatistics` by module name; empty for LoRA, which moves no integers and no zero points.

    Args:
        model: a decoder with adapters.
        counts: of :func:`count_moves`; None counts the moves of ``model``. Where they are given, ``model`` only tells
            names and sizes, and its adapters may be others.
    """
    found: dict[str, AdapterStatistics] = {}
    numbers = jax.device_get(count_moves(model) if counts is None else counts)
    for (names, linear, _), pair in zip(_mergeable(model), numbers, strict=True):
        n_in, n_out = linear.packed.shape
        for name, moved, mu in zip(names, *pair, strict=True):
            found[name] = AdapterStatistics(int(moved), n_in * n_out, float(mu), linear.packed.groups * n_out)
    return found


def moved_shares(model: Decoder) -> dict[str, float]:
    """Share of integer weights that the adapters move, by module name, in [0, 1]."""
    return {name: one.moved / one.integers for name, one in adapter_statistics(model).items()}


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def init_stack(
    init: Callable[[jax.Array, int, int, int], tuple[jax.Array, jax.Array]],
    seed: int,
    labels: np.ndarray | jax.Array,
    n_in: int,
    n_out: int,
    rank: int,
) -> tuple[jax.Array, jax.Array]:
    """A and B of a stack of layers, by ``init`` (key, rows of A, columns of B, rank), a key for each of ``labels``."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(labels)
    return jax.lax.map(lambda key: init(key, n_in, n_out, rank), keys)


# Scans rather than batches over the stacked layers: one layer's unpacked integers at a time.
def _merged_stack(
    words: jax.Array, rest: QuantizedWeight, adapters: WeightAdapter
) -> tuple[jax.Array, jax.Array | None]:
    """New words and mu of every layer of a stack. The words go round the loop, so that they can stay where they are."""

    def one(words: jax.Array, layer: tuple[jax.Array, QuantizedWeight, WeightAdapter]) -> tuple[jax.Array, Any]:
        i, rest, adapter = layer
        merged = merge_adapter(dataclasses.replace(rest, qweight=words[i]), adapter)
        return words.at[i].set(merged.qweight), merged.offset

    return jax.lax.scan(one, words, (jnp.arange(len(words)), rest, adapters))


def _merged(
    words: jax.Array, rest: QuantizedWeight, adapters: WeightAdapter, sharding: MatrixSharding | None
) -> tuple[jax.Array, jax.Array | None]:
    if sharding is None:
        return _merged_stack(words, rest, adapters)
    return merge_stack(words, rest, adapters, sharding, _merged_stack, ("words", "groups"))


_merge_stack = jax.jit(_merged, static_argnums=3)
_merge_stack_in_place = jax.jit(_merged, static_argnums=3, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=2)
def _count_stack(
    weights: QuantizedWeight, adapters: WeightAdapter, sharding: MatrixSharding | None
) -> tuple[jax.Array, jax.Array]:
    """(integers that move, sum of |mu|) of every layer of a stack."""

    def count(words: jax.Array, rest: QuantizedWeight, adapters: WeightAdapter) -> tuple[jax.Array, jax.Array]:
        def one(pair: tuple[QuantizedWeight, WeightAdapter]) -> tuple[jax.Array, jax.Array]:
            merged, moved = merge_and_count(*pair)
            mu = jnp.float32(0) if merged.offset is None else jnp.abs(merged.offset.astype(jnp.float32)).sum()
            return moved, mu

        return jax.lax.map(one, (dataclasses.replace(rest, qweight=words), adapters))

    nothing: Any = None
    rest = dataclasses.replace(weights, qweight=nothing)
    if sharding is None:
        return count(weights.qweight, rest, adapters)
    return merge_stack(weights.qweight, rest, adapters, sharding, count, ("count", "count"))
