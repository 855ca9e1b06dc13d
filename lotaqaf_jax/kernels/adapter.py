"""Ternary adapters of one weight matrix, as the kernels take them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from lotaqaf_jax.ternary import Offset

__all__ = ["TernaryAdapter"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TernaryAdapter:
    """Ternary adapters of one weight matrix and the rule by which they are applied.

    ``a`` (in, rank) and ``b`` (rank, out) hold values in {-1, 0, 1}, int8 at rest, float where gradients are taken;
    ``omega``, ``offset`` and ``offset_dtype`` are static, see :mod:`lotaqaf_jax.ternary`. Arrays may carry leading
    axes that stack layers. Two more static fields are about the backward pass. ``rebuild`` says whether it builds W'
    again; to keep it instead saves time where the forward pass is itself computed again just before, as under
    ``jax.checkpoint``. ``float8`` lets it round x and dy to 8 bits for the product dW' = x.T @ dy alone, where x
    is bfloat16.
    """

    a: jax.Array
    b: jax.Array
    omega: float = dataclasses.field(metadata={"static": True})
    offset: Offset = dataclasses.field(metadata={"static": True})
    offset_dtype: Any = dataclasses.field(metadata={"static": True})
    rebuild: bool = dataclasses.field(default=True, metadata={"static": True})
    float8: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def rank(self) -> int:
        """Inner size of the adapters."""
        return self.a.shape[-1]
