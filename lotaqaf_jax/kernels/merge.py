"""The lossless merge of one weight, by the implementation that runs fastest here."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lotaqaf_jax import qalora
from lotaqaf_jax.kernels.adapter import GroupLowRank, TernaryAdapter, WeightAdapter
from lotaqaf_jax.kernels.adjust import gpu
from lotaqaf_jax.kernels.choose import choose
from lotaqaf_jax.quant.weight import QuantizedWeight
from lotaqaf_jax.ternary import check_settings, merge, ternary_step

__all__ = ["merge_adapter", "merge_and_count"]


def merge_adapter(w: QuantizedWeight, adapter: WeightAdapter, implementation: str | None = None) -> QuantizedWeight:
    """:func:`lotaqaf_jax.ternary.merge` of an adapter.

    QA-LoRA's adapters move no integers: :func:`lotaqaf_jax.qalora.merge`.

    Every implementation gives the same words and the same offset, bit for bit.

    Args:
        w: the quantised weight (in, out), without an offset of its own.
        adapter: its adapters.
        implementation: see :func:`lotaqaf_jax.kernels.choose.choose`.

    Raises:
        ConfigError: an unknown implementation, or adapter settings out of range.
    """
    if isinstance(adapter, GroupLowRank):
        return _shifted(w, adapter)
    check_settings(adapter.rank, adapter.omega, adapter.offset)
    if choose(implementation) == "triton":
        return gpu.merged(w, adapter)[0]
    return _plain(w, adapter)


def merge_and_count(
    w: QuantizedWeight, adapter: WeightAdapter, implementation: str | None = None
) -> tuple[QuantizedWeight, jax.Array]:
    """As :func:`merge_adapter`, and the number of integers that moved, an int32 scalar."""
    if isinstance(adapter, GroupLowRank):
        return _shifted(w, adapter), jnp.int32(0)
    check_settings(adapter.rank, adapter.omega, adapter.offset)
    if choose(implementation) == "triton":
        merged, moved = gpu.merged(w, adapter, count=True)
        return merged, moved.sum()
    steps = ternary_step(w, adapter.a, adapter.b, omega=adapter.omega)
    return _plain(w, adapter), jnp.abs(steps).sum()


def _plain(w: QuantizedWeight, adapter: TernaryAdapter) -> QuantizedWeight:
    rule = {"omega": adapter.omega, "offset": adapter.offset, "offset_dtype": adapter.offset_dtype}
    return merge(w, adapter.a, adapter.b, **rule)


def _shifted(w: QuantizedWeight, adapter: GroupLowRank) -> QuantizedWeight:
    rule = {"scale": adapter.scale, "pool": adapter.pool, "offset_dtype": adapter.offset_dtype}
    return qalora.merge(w, adapter.a, adapter.b, **rule)
