"""Adapters of one weight matrix, as the kernels take them: of LoTA-QAF, of LoRA and of QA-LoRA.

All are a pair A and B with the rule by which it is applied. LoTA-QAF's and QA-LoRA's change the weight that multiplies
x, and can be merged into it; LoRA's make a product of their own beside it. ``parts`` is what a class calls A and B in
files and messages.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from lotaqaf_jax.qalora import Pool
from lotaqaf_jax.ternary import Offset, Surrogate

__all__ = ["AnyAdapter", "GroupLowRank", "LowRank", "TernaryAdapter", "WeightAdapter"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TernaryAdapter:
    """Ternary adapters of one weight matrix and the rule by which they are applied.

    ``a`` (in, rank) and ``b`` (rank, out) hold values in {-1, 0, 1}, int8 at rest, float where gradients are taken;
    ``omega`` is a number, or a float32 array of no axes. Arrays may carry leading axes that stack layers, ``omega``
    too. It has no gradient. ``offset`` and ``offset_dtype`` are static, see :mod:`lotaqaf_jax.ternary`. Three more
    static fields are about the backward pass. ``surrogate`` is the gradient's. ``rebuild`` says whether it builds W'
    again; to keep it instead saves time where the forward pass is itself computed again just before, as under
    ``jax.checkpoint``. ``float8`` lets it round x and dy to 8 bits for the product dW' = x.T @ dy alone, where x
    is bfloat16.
    """

    parts: ClassVar[tuple[str, str]] = ("lota_A", "lota_B")

    a: jax.Array
    b: jax.Array
    omega: float | jax.Array
    offset: Offset = dataclasses.field(metadata={"static": True})
    offset_dtype: Any = dataclasses.field(metadata={"static": True})
    rebuild: bool = dataclasses.field(default=True, metadata={"static": True})
    float8: bool = dataclasses.field(default=False, metadata={"static": True})
    surrogate: Surrogate = dataclasses.field(default="straight", metadata={"static": True})

    @property
    def rank(self) -> int:
        """Inner size of the adapters."""
        return self.a.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """LoRA adapters, see :mod:`lotaqaf_jax.lora`: ``a`` (in, rank) and ``b`` (rank, out), float32.

    ``alpha`` is static. Arrays may carry leading axes that stack layers. ``rebuild`` as in :class:`TernaryAdapter`, of
    the weight beside which the adapters are.
    """

    parts: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")

    a: jax.Array
    b: jax.Array
    alpha: float = dataclasses.field(metadata={"static": True})
    rebuild: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def rank(self) -> int:
        """Inner size of the adapters."""
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """c = alpha / rank, by which the product is multiplied."""
        return self.alpha / self.rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupLowRank:
    """QA-LoRA adapters, see :mod:`lotaqaf_jax.qalora`: ``a`` (groups, rank) and ``b`` (rank, out), float32.

    ``alpha``, ``pool`` and ``offset_dtype`` (the type that mu is stored in) are static. Arrays may carry leading axes
    that stack layers. ``rebuild`` as in :class:`TernaryAdapter`.
    """

    parts: ClassVar[tuple[str, str]] = ("qalora_A", "qalora_B")

    a: jax.Array
    b: jax.Array
    alpha: float = dataclasses.field(metadata={"static": True})
    pool: Pool = dataclasses.field(metadata={"static": True})
    offset_dtype: Any = dataclasses.field(metadata={"static": True})
    rebuild: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def rank(self) -> int:
        """Inner size of the adapters."""
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """c = alpha / rank, by which the product is multiplied."""
        return self.alpha / self.rank


WeightAdapter = TernaryAdapter | GroupLowRank
"""Adapters that change the weight itself."""

AnyAdapter = WeightAdapter | LowRank
