"""Which axes cut which arrays: parts are whole groups and whole words, and every array is cut where it can be."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from lotaqaf_jax.models import Decoder, DecoderConfig, QuantSpec, add_adapters, dense_spec, linears
from lotaqaf_jax.models.spec import LinearSpec
from lotaqaf_jax.parallel import linear_sharding, make_mesh, shard

CONFIG = DecoderConfig(
    model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope_theta=1e4, rope_scaling=None, qkv_bias=True, o_bias=False, mlp_bias=False, tie_word_embeddings=False,
)  # fmt: skip


def abstract(config: DecoderConfig, **quant: Any) -> Decoder:
    spec = dense_spec(config, jnp.float16, QuantSpec(4, 32, **quant))
    return nnx.eval_shape(lambda: Decoder(config, spec, jnp.float32))


def test_the_table_of_the_rules() -> None:
    model = shard(abstract(CONFIG), make_mesh(2, 2, 2))
    found = {names[0].rsplit(".", 1)[1]: linear for names, linear in linears(model)}
    column, row = P(None, None, ("tensor", "fsdp")), P(None, "tensor", "fsdp")
    for name, linear in found.items():
        want = row if name in ("o_proj", "down_proj") else column
        parts = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding.spec, linear.packed))
        assert parts == [want] * 3, name
        assert linear.weight.get_metadata()["out_sharding"] == tuple(want)
        if name in ("q_proj", "k_proj", "v_proj"):
            assert linear.bias is not None
            assert linear.bias.get_value().sharding.spec == P(None, ("tensor", "fsdp"))
    assert model.embed_tokens.weight.get_value().sharding.spec == P(("tensor", "fsdp"))
    assert model.lm_head is not None
    assert model.lm_head.weight.get_value().sharding.spec == P(("tensor", "fsdp"))
    assert model.norm.weight.get_value().sharding.spec == P()
    specs = nnx.get_partition_spec(nnx.state(model.embed_tokens))
    assert specs["weight"].get_value() == P(("tensor", "fsdp"), None), "flax reads the metadata likewise"


def test_adapters_lie_where_their_matrix_does() -> None:
    mesh = make_mesh(2, 2, 2)
    spec = dense_spec(CONFIG, jnp.float16, QuantSpec(4, 32))
    model = add_adapters(shard(Decoder(CONFIG, spec, jnp.float32), mesh), 4, 1)
    for names, linear in linears(model):
        adapters, rows = linear.adapters, names[0].endswith(("o_proj", "down_proj"))
        assert adapters is not None
        assert adapters.a.sharding.spec == P(None, ("tensor", "fsdp") if rows else "fsdp", None)
        assert adapters.b.sharding.spec == P(None, None, "fsdp" if rows else ("tensor", "fsdp"))


def test_act_order_is_cut_by_columns() -> None:
    model = shard(abstract(CONFIG, act_order=True), make_mesh(1, 2, 4))
    for _, linear in linears(model):
        assert linear.sharding is not None
        assert not linear.sharding.rows
        assert linear.sharding.columns


def test_attention_is_cut_by_whole_kv_heads_only() -> None:
    config = dataclasses.replace(CONFIG, num_key_value_heads=2)
    model = shard(abstract(config), make_mesh(1, 2, 4))
    assert model.sharding is not None
    assert not model.sharding.heads
    cut = {
        names[0].rsplit(".", 1)[1]: linear.sharding.rows or linear.sharding.columns
        for names, linear in linears(model)
        if linear.sharding is not None
    }
    assert cut == {name: name in ("gate_proj", "up_proj", "down_proj") for name in cut}


@settings(deadline=None)
@given(
    st.integers(1, 40).map(lambda n: 16 * n),
    st.integers(1, 40).map(lambda n: 8 * n),
    st.sampled_from([-1, 16, 32, 64, 128]),
    st.sampled_from([(1, 8, 1), (1, 4, 2), (2, 1, 4), (1, 1, 8)]),
    st.sampled_from(["gate_proj", "down_proj"]),
    st.sampled_from([2, 3, 4, 8]),
)
def test_parts_are_equal_and_made_of_whole_groups_and_words(
    n_in: int, n_out: int, group_size: int, shape: tuple[int, int, int], name: str, bits: int
) -> None:
    mesh = make_mesh(*shape)
    spec = LinearSpec(n_in, n_out, quant=QuantSpec(bits, group_size))
    found = linear_sharding(CONFIG, name, spec, mesh)
    assert not (found.rows and found.columns)
    if found.rows and shape[2] > 1:
        rows = n_in // shape[2]
        assert n_in % shape[2] == 0
        assert rows % group_size == 0
        assert rows * bits % 32 == 0
    parts = (shape[2] if found.columns else 1) * (shape[1] if found.stored_columns else 1)
    assert n_out % parts == 0
    if name == "gate_proj" and n_out % (shape[1] * shape[2]) == 0:
        assert parts == shape[1] * shape[2], "what can be cut is"


@pytest.mark.parametrize("count", [511, 514])
def test_a_vocabulary_that_cannot_be_cut_stays_whole(count: int) -> None:
    model = shard(abstract(dataclasses.replace(CONFIG, vocab_size=count)), make_mesh(1, 2, 4))
    assert model.sharding is not None
    assert model.sharding.vocab_axes == (("fsdp",) if count % 2 == 0 else ())
