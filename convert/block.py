"""GPTQ of one decoder block: its projections in the order in which it computes them, each with the inputs it will get.

A projection is quantised for the inputs that it gets when all before it are quantised already ("true sequential"), so
for each of the four distinct inputs of a block (of q/k/v, o, gate/up and down) the calibration samples go through the
block once more. What the block computes is said by :class:`lotaqaf_jax.models.decoder.Block` alone: an input is read by
putting a :class:`_Tap` in the place of the projection, and the compiler drops what comes behind it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import PROJECTIONS, DecoderConfig, Linear
from lotaqaf_jax.models.decoder import Block, causal
from lotaqaf_jax.models.rope import rope_angles
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.quant.gptq import GPTQResult, quantize_layer
from lotaqaf_jax.quant.hessian import accumulate_hessian, factor_hessian
from lotaqaf_jax.quant.packing import check_bits

__all__ = ["STAGES", "GPTQSettings", "Quantized", "Stream", "quantize_block"]

STAGES = (PROJECTIONS[0:3], PROJECTIONS[3:4], PROJECTIONS[4:6], PROJECTIONS[6:7])
"""The projections that share an input, in the order in which a block computes them."""

_CHUNK_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class GPTQSettings:
    """How every projection is quantised; the arguments of :func:`lotaqaf_jax.quant.gptq.quantize_layer`.

    Raises:
        ConfigError: a setting out of range, or two that exclude each other.
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = False
    desc_act: bool = False
    act_group_aware: bool = True
    damp_percent: float = 0.05
    grid_search: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits, "--bits")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(f"--group_size: found {self.group_size}, expected -1 (one group) or more than 0.")
        if not 0 <= self.damp_percent < np.inf:
            raise ConfigError(f"--damp_percent: found {self.damp_percent}, expected a share of the mean, such as 0.05.")

    @property
    def together(self) -> int | None:
        """Of :func:`lotaqaf_jax.quant.hessian.factor_hessian`."""
        return self.group_size if self.act_group_aware and not self.desc_act else None


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantised projection.

    Attributes:
        name: of the module.
        result: integers, scales, zero points and groups.
        error: trace(E^T H E) / trace(W^T H W): the mean square of what its outputs lost, as a share of theirs.
        damp_percent: the damping that the Hessian needed.
    """

    name: str
    result: GPTQResult
    error: float


class Stream:
    """The residual stream of all calibration samples, on the host; chunks of it go to the device.

    Attributes:
        x: (samples, length, hidden) in the type that the model computes in: what enters the next block.
        keep: (samples, length) bool, False at padding, which is at the end of samples.
    """

    def __init__(self, x: np.ndarray, keep: np.ndarray) -> None:
        self.x = x
        self.keep = keep
        self._rows = min(len(x), max(1, _CHUNK_TOKENS // x.shape[1]))

    @classmethod
    def embedded(cls, ids: list[np.ndarray], table: np.ndarray, dtype: Any) -> Stream:
        """The samples' embeddings: rows ``ids`` of the table (vocab, hidden), samples padded to the longest."""
        length = max(map(len, ids))
        x = np.zeros((len(ids), length, table.shape[1]), dtype)
        keep = np.zeros((len(ids), length), bool)
        for i, sample in enumerate(ids):
            x[i, : len(sample)] = table[sample]
            keep[i, : len(sample)] = True
        return cls(x, keep)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(samples, their x, their keep) in chunks of one size; the last is filled up with padding."""
        for start in range(0, len(self.x), self._rows):
            rows = slice(start, min(start + self._rows, len(self.x)))
            missing = self._rows - (rows.stop - rows.start)
            x, keep = self.x[rows], self.keep[rows]
            if missing:
                x, keep = np.pad(x, ((0, missing), (0, 0), (0, 0))), np.pad(keep, ((0, missing), (0, 0)))
            yield rows, x, keep

    def advance(self, block: Block, config: DecoderConfig, part: str) -> None:
        """Replace x by what a half of the block, "self_attn" or "mlp", makes of it, chunk by chunk in place."""
        graph, state = nnx.split(block)
        for rows, x, _ in self.chunks():
            self.x[rows] = np.asarray(_half(graph, config, part, state, x))[: rows.stop - rows.start]


def quantize_block(
    block: Block,
    stream: Stream,
    folder: CheckpointFolder,
    config: DecoderConfig,
    index: int,
    settings: GPTQSettings,
) -> Iterator[Quantized]:
    """Quantise the projections of a block; as each is done, its weight in ``block`` is replaced by the dequantised one.

    Args:
        block: the layer with its own weights, from :func:`lotaqaf_jax.models.loading.load_block`.
        stream: what enters it.
        folder: the checkpoint; the weights that are rounded are read from it, in the type they are stored in.
        config: of the decoder.
        index: which layer it is.
        settings: how.

    Yields:
        Every projection, in the order of :data:`lotaqaf_jax.models.PROJECTIONS`.

    Raises:
        CheckpointError, DataError: see :func:`lotaqaf_jax.quant.gptq.quantize_layer`.
    """
    prefix = f"model.layers.{index}"
    for stage in STAGES:
        hessian = _hessian(block, stage[0], stream, config)
        factor = factor_hessian(
            hessian,
            desc_act=settings.desc_act,
            together=settings.together,
            damp_percent=settings.damp_percent,
            name=f"{prefix}.{stage[0]}",
        )
        for path in stage:
            name = f"{prefix}.{path}"
            weight = jnp.asarray(folder.read(f"{name}.weight")).T.astype(jnp.float32)
            result = quantize_layer(weight, factor, name=name, **dataclasses.asdict(settings))
            linear = block.linear(path)
            linear.weight.set_value(_dequantized(result, linear.weight.get_value().dtype))
            yield Quantized(name, result, float(result.loss / _energy(weight, hessian)))
        if stage in STAGES[1::2]:
            stream.advance(block, config, stage[0].split(".")[0])


def _hessian(block: Block, path: str, stream: Stream, config: DecoderConfig) -> jax.Array:
    graph, state = nnx.split(block)
    size = block.linear(path).weight.get_value().shape[-1]
    hessian, count = jnp.zeros((size, size), jnp.float32), jnp.int32(0)
    for _, x, keep in stream.chunks():
        hessian, count = _accumulate(graph, config, path, hessian, count, state, x, keep)
    return hessian


class _Tap:
    """A projection that keeps what it is given."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self.seen: jax.Array | None = None

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        self.seen = x
        return self.linear(x, layer)

    summand = __call__


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _half(graph: nnx.GraphDef, config: DecoderConfig, part: str, state: nnx.State, x: jax.Array) -> jax.Array:
    """What a half of the block, "self_attn" or "mlp", makes of x (samples, length, hidden)."""
    return _run_half(nnx.merge(graph, state), config, part, x)


def _run_half(block: Block, config: DecoderConfig, part: str, x: jax.Array) -> jax.Array:
    if part == "mlp":
        return block.mlp_half(x)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return block.attention_half(x, causal(rope_angles(positions, config)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _accumulate(
    graph: nnx.GraphDef,
    config: DecoderConfig,
    path: str,
    hessian: jax.Array,
    count: jax.Array,
    state: nnx.State,
    x: jax.Array,
    keep: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Add what the projection at ``path`` is given, when x enters its half of the block, to its Hessian."""
    block = nnx.merge(graph, state)
    part, name = path.split(".")
    tap = _Tap(block.linear(path))
    setattr(getattr(block, part), name, tap)
    _run_half(block, config, part, x)
    assert tap.seen is not None
    return accumulate_hessian(hessian, count, tap.seen, keep)


@functools.partial(jax.jit, static_argnums=1)
def _dequantized(result: GPTQResult, dtype: Any) -> jax.Array:
    return result.dequantize().astype(dtype).T


@jax.jit
def _energy(weight: jax.Array, hessian: jax.Array) -> jax.Array:
    """trace(W^T H W)."""
    return jnp.sum(weight * jnp.matmul(hessian, weight, precision=jax.lax.Precision.HIGHEST))
