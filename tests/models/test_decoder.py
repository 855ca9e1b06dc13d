"""The decoder by itself: causality, segments, recomputation, memory. Its numbers are held by ``test_parity``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lotaqaf_jax.models import Adapter, Decoder, QuantSpec, add_adapters, init_decoder, linears
from lotaqaf_jax.models.decoder import attention_mask
from tests.models.tiny import CONFIG, quantized_decoder, set_random_adapters, tokens


@pytest.fixture(scope="module")
def model() -> Decoder:
    return quantized_decoder()


def test_logits_are_float32_of_every_position(model: Decoder) -> None:
    logits = model(tokens())
    assert (logits.shape, logits.dtype) == ((2, 12, 64), jnp.float32)
    assert np.isfinite(logits).all()
    assert 0.1 < np.std(logits) < 100, "the random model should neither vanish nor explode"


def test_no_token_sees_a_later_one(model: Decoder) -> None:
    ids = tokens()
    changed = ids.at[:, 7].set((ids[:, 7] + 1) % 64)
    before, after = model(ids), model(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:], atol=1e-2)


def test_the_default_positions_count_from_zero(model: Decoder) -> None:
    ids = tokens()
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    np.testing.assert_array_equal(model(ids), model(ids, positions))
    assert not np.allclose(model(ids), model(ids, 3 * positions), atol=1e-2)


def test_packed_rows_equal_separate_rows(model: Decoder) -> None:
    """Three examples and padding in one row; a token attends only to earlier ones of its own segment."""
    lengths = (5, 1, 4)
    row = tokens(1)
    positions = jnp.concatenate([jnp.arange(n) for n in (*lengths, 2)])[None]
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], (*lengths, 2)))[None]
    packed = model(row, positions, segments)
    for start, stop in ((0, 5), (5, 6), (6, 10)):
        np.testing.assert_allclose(packed[:, start:stop], model(row[:, start:stop]), rtol=1e-5, atol=1e-5)
    assert np.isfinite(packed).all()
    other = row.at[0, 2].set((row[0, 2] + 1) % 64)
    np.testing.assert_array_equal(model(other, positions, segments)[:, 5:], packed[:, 5:])


def test_the_mask_is_of_equal_segments() -> None:
    mask = attention_mask(jnp.array([[1, 1, 2, 0]]))
    assert mask.shape == (1, 1, 4, 4)
    np.testing.assert_array_equal(mask[0, 0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_bfloat16_is_near_float32(model: Decoder) -> None:
    narrow = quantized_decoder(dtype=jnp.bfloat16)
    found, expected = narrow(tokens()), model(tokens())
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).mean() < 0.05 * np.std(expected)


def test_layers_that_look_alike_are_one_segment() -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=4, tie_word_embeddings=False)
    model = quantized_decoder(config)
    assert len(model.segments) == 1
    assert next(names[-1] for names, _ in linears(model)) == "model.layers.3.self_attn.q_proj"
    first = model.segments[0].self_attn.q_proj.packed
    assert first.qweight.shape == (4, 4, 32)
    assert model.lm_head is not None


def test_a_random_dense_decoder() -> None:
    model = init_decoder(CONFIG, jax.random.key(0), scale=0.05)
    layer = model.segments[0]
    weight = layer.mlp.up_proj.weight.get_value()
    assert weight.shape == (3, 48, 32)
    assert abs(float(jnp.std(weight)) - 0.05) < 0.002
    np.testing.assert_array_equal(layer.input_layernorm.weight.get_value(), np.ones((3, 32)))
    np.testing.assert_array_equal(layer.self_attn.q_proj.bias.get_value(), np.zeros((3, 32)))
    assert abs(float(jnp.std(model.embed_tokens.weight.get_value())) - 0.05) < 0.002
    again, other = (init_decoder(CONFIG, jax.random.key(seed), scale=0.05)(tokens()) for seed in (0, 1))
    np.testing.assert_array_equal(model(tokens()), again)
    assert not np.allclose(again, other)


WIDE = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=128, head_dim=32, num_key_value_heads=4)


def adapted(layers: int) -> Decoder:
    """A quantised decoder with float adapters."""
    config = dataclasses.replace(WIDE, num_hidden_layers=layers)
    model = add_adapters(quantized_decoder(config, QuantSpec(4, 32)), rank=4, omega=1)
    set_random_adapters(model, kind=jnp.float32)
    return model


def loss_gradient(model: Decoder, recompute: Any) -> Any:
    """The gradient of a loss with respect to the adapters, compiled for 1 x 4 tokens.

    The loss is the mean square of the logits.
    """
    graph, state = nnx.split(model)

    def run(state: nnx.State, ids: jax.Array) -> tuple[jax.Array, nnx.State]:
        graph_of_parts, adapters, rest = nnx.split(nnx.merge(graph, state), Adapter, ...)

        def loss(adapters: nnx.State) -> jax.Array:
            model = nnx.merge(graph_of_parts, adapters, rest)
            return jnp.mean(model.head(model.hidden_states(ids, recompute=recompute)) ** 2)

        return jax.value_and_grad(loss)(adapters)

    # Not optimised: neither the buffers nor the tolerances below depend on it.
    return jax.jit(run).lower(state, tokens(1, 4)).compile({"xla_backend_optimization_level": 0})


def test_recomputing_blocks_changes_no_gradient_and_a_layer_more_costs_its_input_alone() -> None:
    model = adapted(4)
    recomputing, keeping = (loss_gradient(model, recompute) for recompute in ("block", "none"))
    (loss, ours), (expected_loss, theirs) = (run(nnx.state(model), tokens(1, 4)) for run in (recomputing, keeping))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert len(jax.tree.leaves(ours)) == 14
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)

    # Temporary memory: the dequantised weights of one layer, whatever the depth.
    deeper = loss_gradient(nnx.eval_shape(lambda: adapted(12)), "block")
    few, many = (run.memory_analysis().temp_size_in_bytes for run in (recomputing, deeper))
    hidden, one_projection = 4 * 128 * 4, 128 * 128 * 4
    assert few > one_projection, "the weights of one layer do have to exist at some time"
    assert (many - few) / 8 <= 2 * hidden
