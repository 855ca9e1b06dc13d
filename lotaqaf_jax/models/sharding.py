"""What a mesh of devices does to the parts of a decoder that are no projections."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lotaqaf_jax.kernels.attention import causal_attention
from lotaqaf_jax.kernels.sharded import shard_map
from lotaqaf_jax.kernels.sharding import FSDP, TENSOR, Axes, batch_axes, named, spec

__all__ = ["DecoderSharding"]


@dataclasses.dataclass(frozen=True)
class DecoderSharding:
    """A decoder on a mesh.

    Attributes:
        mesh: with the axes data, fsdp and tensor.
        heads: whether TENSOR cuts the heads of attention.
        vocab: whether TENSOR cuts the vocabulary of embedding and head.
        stored_vocab: whether FSDP cuts it too, as stored.
    """

    mesh: Mesh
    heads: bool
    vocab: bool
    stored_vocab: bool

    @property
    def vocab_axes(self) -> Axes:
        """The axes that cut the vocabulary as stored."""
        return (*self.table_axes, *((FSDP,) if self.stored_vocab else ()))

    @property
    def table_axes(self) -> Axes:
        """The axes that cut it where the table is used."""
        return (TENSOR,) if self.vocab else ()

    def named(self, *entries: Axes | None) -> NamedSharding:
        """A sharding by the axes of each dimension."""
        return named(self.mesh, *entries)

    def spread(self, x: jax.Array) -> jax.Array:
        """x (rows, ...) with its rows cut over the mesh where that goes evenly, and nothing else."""
        return jax.lax.with_sharding_constraint(x, self.named(batch_axes(self.mesh, len(x))))

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        """:func:`lotaqaf_jax.kernels.attention.causal_attention`, every device with its own rows and heads."""
        rows = batch_axes(self.mesh, len(q))
        heads = spec(rows, None, (TENSOR,) if self.heads else ())
        specs = (heads, heads, heads, None if mask is None else spec(rows))
        return shard_map(causal_attention, self.mesh, specs, heads)(q, k, v, mask)

    def take(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows of an embedding (vocab, hidden), (rows, length) -> (rows, length, hidden) in the table's type.

        Where the vocabulary is cut, each device looks up what it has, and the sum has one term that is not 0.
        """
        rows = batch_axes(self.mesh, len(ids))

        def local(table: jax.Array, ids: jax.Array) -> jax.Array:
            if not self.vocab:
                return table[ids]
            places = ids - jax.lax.axis_index(TENSOR) * len(table)
            mine = (places >= 0) & (places < len(table))
            found = table[jnp.where(mine, places, 0)] * mine[..., None].astype(table.dtype)
            return jax.lax.psum(found, TENSOR)

        return shard_map(local, self.mesh, (spec(self.table_axes), spec(rows)), spec(rows))(table, ids)
