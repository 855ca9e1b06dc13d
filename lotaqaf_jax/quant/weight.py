"""``QuantizedWeight``: the packed weight matrix that every other room speaks."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.quant.packing import check_bits, pack, packed_size, unpack
from lotaqaf_jax.quant.zeros import check_format, decode_zeros, encode_zeros

__all__ = ["QuantizedWeight", "affine", "group_count", "group_length", "trivial_g_idx"]


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups along the inputs: ceil(in/group_size), or 1 for ``group_size=-1``."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def group_length(in_features: int, group_size: int) -> int:
    """Rows of a whole group: group_size, or all of them for ``group_size=-1``."""
    return in_features if group_size == -1 else group_size


def trivial_g_idx(in_features: int, group_size: int) -> np.ndarray:
    """The group of every input row without act-order: i // group_size, (in,) int32."""
    return np.arange(in_features, dtype=np.int32) // group_length(in_features, group_size)


def affine(steps: jax.Array, scales: jax.Array, offset: jax.Array | None) -> jax.Array:
    """s * (steps + mu), the one expression by which integers become weights.

    ``steps`` is q - z (int32, exact), so without an offset the result is the float32 product of scale and integer.
    The offset is kept behind an optimisation barrier: a compiler may then not contract its rounding into the sum, and
    a weight computed while training equals, bit for bit, the weight computed from stored words and offset.

    Args:
        steps: (in, out) int32.
        scales: (in, out) float, already spread over the rows of each group.
        offset: (in, out) float, likewise, or None for 0.

    Returns:
        (in, out) float32.
    """
    value = steps.astype(jnp.float32)
    if offset is not None:
        value = value + jax.lax.optimization_barrier(offset).astype(jnp.float32)
    return scales.astype(jnp.float32) * value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix W (in, out) in integers of 2, 3, 4 or 8 bits, packed.

        W[i, j] = scales[g(i), j] * (q[i, j] - zeros[g(i), j] + offset[g(i), j])

    with q the integers in ``qweight``, g(i) = ``g_idx[i]``, or i // group_size where ``g_idx`` is None, and offset 0
    where it is None. Invariants, held by :meth:`validate`:

    * ``qweight`` is (ceil(in*bits/32), out) int32, packed along the inputs (see :mod:`lotaqaf_jax.quant.packing`);
    * ``scales`` is (groups, out), float16, bfloat16 or float32, finite; groups = ceil(in/group_size), or 1 for -1;
    * ``zeros`` is (groups, out) uint8: true zero points in {0, ..., 2**bits - 1}, whatever the file stored;
    * ``g_idx`` is (in,) int32 in {0, ..., groups - 1}, or None when it is i // group_size;
    * ``offset`` is (groups, out) float, mu of the LoTA-QAF merge, or None.

    Arrays may carry leading axes that stack the same matrix of several layers; ``shape`` is always that of one.
    ``bits``, ``group_size``, ``shape`` and ``checkpoint_format`` are static (part of the pytree's structure).
    """

    qweight: jax.Array
    scales: jax.Array
    zeros: jax.Array
    g_idx: jax.Array | None
    offset: jax.Array | None
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    checkpoint_format: str = dataclasses.field(default="gptq", metadata={"static": True})

    @property
    def groups(self) -> int:
        """Number of groups along the inputs."""
        return group_count(self.shape[0], self.group_size)

    @classmethod
    def from_gptq(
        cls,
        qweight: ArrayLike,
        qzeros: ArrayLike,
        scales: ArrayLike,
        g_idx: ArrayLike | None = None,
        *,
        bits: int,
        group_size: int,
        checkpoint_format: str = "gptq",
        in_features: int | None = None,
        name: str = "weight",
    ) -> QuantizedWeight:
        """Build from the four arrays of a GPTQ checkpoint. The packed words are taken as they are.

        Args:
            qweight: (ceil(in*bits/32), out) int32.
            qzeros: (groups, ceil(out*bits/32)) int32, in the convention of ``checkpoint_format``.
            scales: (groups, out) float.
            g_idx: (in,) int32, or None for i // group_size.
            bits: 2, 3, 4 or 8.
            group_size: rows in a group; -1 for one group.
            checkpoint_format: ``gptq`` (stores zero points minus one) or ``gptq_v2``.
            in_features: number of inputs; needed only where ``g_idx`` is None and the last word is not full.
            name: what to call the weight in errors.

        Raises:
            ConfigError: unsupported width or format.
            CheckpointError: a shape, type or value breaks an invariant.

        Source: GPTQ on disk, formats ``gptq`` and ``gptq_v2``.
        """
        bits, group_size = check_bits(bits, f"{name}: bits"), operator.index(group_size)
        check_format(checkpoint_format, f"{name}: checkpoint_format")
        out_features = np.shape(scales)[-1]
        if in_features is None:
            in_features = np.shape(g_idx)[0] if g_idx is not None else np.shape(qweight)[0] * 32 // bits
        groups = group_count(in_features, group_size)
        _expect(name, "qzeros", np.shape(qzeros), (groups, packed_size(out_features, bits)))
        _expect_int32(name, "qzeros", qzeros)
        if g_idx is not None:
            _expect_int32(name, "g_idx", g_idx)
        if g_idx is not None and np.array_equal(np.asarray(g_idx), trivial_g_idx(in_features, group_size)):
            g_idx = None
        weight = cls(
            qweight=jnp.asarray(qweight),
            scales=jnp.asarray(scales),
            zeros=decode_zeros(qzeros, bits, out_features, checkpoint_format),
            g_idx=None if g_idx is None else jnp.asarray(g_idx),
            offset=None,
            bits=bits,
            group_size=group_size,
            shape=(in_features, out_features),
            checkpoint_format=checkpoint_format,
        )
        weight.validate(name)
        return weight

    def to_gptq(self) -> dict[str, jax.Array]:
        """The four arrays of a GPTQ checkpoint: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

        The exact inverse of :meth:`from_gptq` in the same ``checkpoint_format``; only bits that no zero point uses, at
        the end of a row whose last word is not full, are not kept. A GPTQ file has no place for
        ``offset``; it is not among the arrays, and whoever writes a merged weight puts it elsewhere.
        """
        g_idx = self.g_idx
        return {
            "qweight": self.qweight,
            "qzeros": encode_zeros(self.zeros, self.bits, self.checkpoint_format),
            "scales": self.scales,
            "g_idx": jnp.asarray(trivial_g_idx(self.shape[0], self.group_size)) if g_idx is None else g_idx,
        }

    def integers(self) -> jax.Array:
        """q, the unpacked integers, (in, out) int32 in {0, ..., 2**bits - 1}."""
        return unpack(self.qweight, self.bits, self.shape[0], axis=-2).astype(jnp.int32)

    def with_integers(self, integers: ArrayLike) -> QuantizedWeight:
        """The same grid with other integers, (in, out) in {0, ..., 2**bits - 1}."""
        return dataclasses.replace(self, qweight=pack(integers, self.bits, axis=-2))

    def spread(self, per_group: jax.Array) -> jax.Array:
        """Give every input row the value of its group: (groups, columns) -> (in, columns), any number of columns."""
        if self.g_idx is not None:
            return jnp.take(per_group, self.g_idx, axis=-2)
        if self.groups == 1:
            return jnp.broadcast_to(per_group, (*per_group.shape[:-2], self.shape[0], per_group.shape[-1]))
        return jnp.repeat(per_group, self.group_size, axis=-2)[..., : self.shape[0], :]

    def group_sum(self, per_row: jax.Array) -> jax.Array:
        """Sum over the rows of each group: (in, columns) -> (groups, columns), any number of columns."""
        if self.g_idx is not None:
            return jax.ops.segment_sum(per_row, self.g_idx, num_segments=self.groups)
        rows = group_length(self.shape[0], self.group_size)
        padded = jnp.pad(per_row, ((0, self.groups * rows - self.shape[0]), (0, 0)))
        return padded.reshape(self.groups, rows, -1).sum(axis=1)

    def group_rows(self) -> jax.Array:
        """Number of rows in each group, (groups, 1) float32; at least 1, so that it can divide."""
        if self.g_idx is not None:
            rows = jnp.zeros(self.groups, jnp.float32).at[self.g_idx].add(1.0)
        else:
            trivial = trivial_g_idx(self.shape[0], self.group_size)
            rows = jnp.asarray(np.bincount(trivial, minlength=self.groups).astype(np.float32))
        return jnp.maximum(rows, 1.0)[:, None]

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """W by the formula above, computed in float32 and rounded once to ``dtype``; (in, out)."""
        steps = self.integers() - self.spread(self.zeros).astype(jnp.int32)
        offset = None if self.offset is None else self.spread(self.offset)
        return affine(steps, self.spread(self.scales), offset).astype(dtype)

    def validate(self, name: str = "weight", *, stacked: int = 0) -> None:
        """Check the invariants of the class; values are looked at, so this is for concrete arrays.

        Args:
            name: what to call the weight in errors.
            stacked: number of leading axes that stack layers.

        Raises:
            CheckpointError: names the tensor, what was found and what was expected.
        """
        in_features, out_features = self.shape
        words = packed_size(in_features, self.bits)
        _expect(name, "qweight", self.qweight.shape[stacked:], (words, out_features))
        _expect_int32(name, "qweight", self.qweight)
        _expect(name, "scales", self.scales.shape[stacked:], (self.groups, out_features))
        _expect_finite(name, "scales", self.scales)
        _expect(name, "zeros", self.zeros.shape[stacked:], (self.groups, out_features))
        if self.zeros.dtype != jnp.uint8:
            raise CheckpointError(f"{name}.zeros: found {self.zeros.dtype}, expected uint8.")
        largest = int(np.asarray(self.zeros).max())
        if largest > 2**self.bits - 1:
            raise CheckpointError(
                f"{name}.zeros: values up to {largest}, expected at most {2**self.bits - 1} for {self.bits} bits."
            )
        if self.g_idx is not None:
            _expect(name, "g_idx", self.g_idx.shape[stacked:], (in_features,))
            _expect_int32(name, "g_idx", self.g_idx)
            index = np.asarray(self.g_idx)
            if index.min() < 0 or index.max() >= self.groups:
                raise CheckpointError(
                    f"{name}.g_idx: values run from {index.min()} to {index.max()}, expected groups 0 to "
                    f"{self.groups - 1} for {in_features} inputs in groups of {self.group_size}."
                )
        if self.offset is not None:
            _expect(name, "offset", self.offset.shape[stacked:], (self.groups, out_features))
            _expect_finite(name, "offset", self.offset)


def _expect_int32(name: str, tensor: str, found: Any) -> None:
    if jnp.result_type(found) != jnp.int32:
        raise CheckpointError(f"{name}.{tensor}: found {jnp.result_type(found)}, expected int32.")


def _expect_finite(name: str, tensor: str, found: jax.Array) -> None:
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise CheckpointError(f"{name}.{tensor}: found {found.dtype}, expected a float type.")
    finite = np.isfinite(np.asarray(found, np.float32))
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise CheckpointError(
            f"{name}.{tensor}: {np.count_nonzero(~finite)} of {finite.size} values are NaN or infinite, "
            f"the first at {place}. The checkpoint is damaged or its quantisation overflowed; quantise it again."
        )


def _expect(name: str, tensor: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{name}.{tensor}: found shape {tuple(found)}, expected {tuple(expected)}. "
            "Check bits and group_size in the quantisation config against the tensors."
        )
