"""The rules: which mesh axes cut which dimension of a decoder's arrays. The one place that decides it.

| arrays                          | tensor cuts                | fsdp cuts, as stored  |
| ------------------------------- | -------------------------- | --------------------- |
| q, k, v, gate, up, and their B  | out                        | out                   |
| o, down                         | in, by whole groups        | out                   |
| A                               | in, where W's is cut       | in                    |
| embedding, output head          | vocabulary                 | vocabulary            |
| norms, omega                    | nothing                    | nothing               |
| rows of a batch                 | nothing                    | rows, as data does    |

An axis that does not divide a dimension evenly leaves it whole. Attention is cut only by whole kv heads, and o and down
by their columns where rows cannot be: where a cut would run through a group, or act-order puts a group anywhere.
"""

from __future__ import annotations

from jax.sharding import Mesh

from lotaqaf_jax.kernels.sharding import FSDP, TENSOR, MatrixSharding
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.sharding import DecoderSharding
from lotaqaf_jax.models.spec import LinearSpec

__all__ = ["ROWS", "cuts_rows", "decoder_sharding", "linear_sharding"]

ROWS = ("o_proj", "down_proj")
"""Projections that tensor cuts by ``in`` where it can; the others by ``out``."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def decoder_sharding(config: DecoderConfig, mesh: Mesh) -> DecoderSharding:
    """What the mesh does to attention, and to embedding and output head."""
    tensor, fsdp = mesh.shape[TENSOR], mesh.shape[FSDP]
    heads = config.num_key_value_heads % tensor == 0 and config.num_attention_heads % tensor == 0
    vocab = config.vocab_size % tensor == 0
    stored = (config.vocab_size // (tensor if vocab else 1)) % fsdp == 0
    return DecoderSharding(mesh, heads=heads, vocab=vocab, stored_vocab=stored)


def linear_sharding(config: DecoderConfig, name: str, spec: LinearSpec, mesh: Mesh) -> MatrixSharding:
    """How a projection lies on the mesh.

    Args:
        config: of the decoder.
        name: of the projection, such as "o_proj".
        spec: its sizes and how it is quantised.
        mesh: the mesh.
    """
    tensor, fsdp = mesh.shape[TENSOR], mesh.shape[FSDP]
    cut = name not in _ATTENTION or decoder_sharding(config, mesh).heads
    rows = cut and name in ROWS and cuts_rows(spec, tensor)
    columns = cut and not rows and spec.out_features % tensor == 0
    n_in, n_out = spec.in_features // (tensor if rows else 1), spec.out_features // (tensor if columns else 1)
    return MatrixSharding(mesh, rows, columns, stored_columns=n_out % fsdp == 0, stored_rows=n_in % fsdp == 0)


def cuts_rows(spec: LinearSpec, parts: int) -> bool:
    """Whether ``in`` of a weight falls into ``parts`` equal parts of whole groups and whole words."""
    if spec.in_features % parts:
        return False
    if spec.quant is None or parts == 1:
        return True
    rows, size = spec.in_features // parts, spec.quant.group_size
    return size > 0 and rows % size == 0 and rows % 32 == 0 and not spec.quant.act_order
