"""Generation with a cache is generation without one: whole forward passes, prompts alone, one token at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.generation import GenerationResult, generate
from lotaqaf_jax.generation.loop import _generate, _program, bucket
from lotaqaf_jax.generation.sampling import Sampling
from lotaqaf_jax.models import Decoder, QuantSpec, add_adapters, add_lora, add_qalora, dense_spec, init_decoder, merge
from lotaqaf_jax.models.cache import KVCache
from tests.models.tiny import CONFIG, fill_decoder, quantized_decoder, set_random_adapters, set_random_low_rank

QWEN2 = dataclasses.replace(CONFIG, tie_word_embeddings=False, max_position_embeddings=96)
LLAMA = dataclasses.replace(QWEN2, model_type="llama", qkv_bias=False, num_key_value_heads=1)
LENGTHS = (9, 4, 1)
NEW = 12


def prompts(lengths: tuple[int, ...] = LENGTHS) -> np.ndarray:
    """Random prompts, padded with ids of no token."""
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (len(lengths), max(lengths)))
    return np.where(np.arange(max(lengths)) < np.asarray(lengths)[:, None], ids, -7)


def two_segments() -> Decoder:
    """A Qwen2 whose first layer has a dense MLP, as ``dynamic`` leaves it; the other two layers are packed."""
    quant = QuantSpec(3, 16, act_order=True)
    packed, dense = (dense_spec(QWEN2, jnp.float16, kind).layers[0] for kind in (quant, None))
    spec = dataclasses.replace(
        dense_spec(QWEN2, jnp.float16, quant), layers=((*packed[:4], *dense[4:]), packed, packed)
    )
    model = Decoder(QWEN2, spec)
    fill_decoder(model, quant)
    return model


def adapted() -> Decoder:
    model = add_adapters(quantized_decoder(LLAMA, QuantSpec(3, 32)), rank=6, omega=3)
    set_random_adapters(model)
    return model


def low_rank(model: Decoder, seed: int, size: float) -> Decoder:
    """The model with adapters that change what it writes, but do not drown what it was."""
    set_random_low_rank(model, seed, size)
    return model


MODELS = {
    "llama-packed": lambda: quantized_decoder(LLAMA, QuantSpec(8, -1)),
    "llama-merged": lambda: merge(adapted()),
    "qwen2-two-segments-lora": lambda: low_rank(add_lora(two_segments(), rank=3), 0, 0.02),
    "llama-qalora": lambda: low_rank(add_qalora(quantized_decoder(LLAMA, QuantSpec(8, -1)), rank=3), 1, 0.01),
}


def run(model: Decoder, lengths: tuple[int, ...] = LENGTHS, **settings: Any) -> GenerationResult:
    return generate(model, prompts(lengths), lengths, **({"max_new_tokens": NEW} | settings))


def without_cache(model: Decoder) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their log-probabilities, one whole forward pass over everything so far for each token."""
    rows = np.arange(len(LENGTHS))
    end = np.asarray(LENGTHS)
    ids = np.zeros((len(LENGTHS), 32), np.int32)
    ids[:, : max(LENGTHS)] = np.maximum(prompts(), 0)
    tokens, log_probs = [], []
    for _ in range(NEW):
        logits = np.asarray(model(jnp.asarray(ids)))[rows, end - 1]
        tokens.append(logits.argmax(-1))
        log_probs.append(np.asarray(jax.nn.log_softmax(logits))[rows, tokens[-1]])
        ids[rows, end] = tokens[-1]
        end = end + 1
    return np.stack(tokens, 1), np.stack(log_probs, 1)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return MODELS["llama-packed"]()


@pytest.fixture(scope="module")
def greedy(model: Decoder) -> GenerationResult:
    return run(model)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_whole_forward_passes(name: str) -> None:
    model = MODELS[name]()
    expected, log_probs = without_cache(model)
    assert min(len(set(row)) for row in expected.tolist()) > 3, "a model that repeats one token would prove little"
    result = run(model)
    np.testing.assert_array_equal(result.tokens, expected)
    np.testing.assert_array_equal(result.lengths, [NEW] * 3)
    np.testing.assert_allclose(result.log_probs, log_probs, atol=2e-4)


def test_adapters_and_merged_weights_write_the_same() -> None:
    model = adapted()
    one, other = run(model), run(merge(model))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_gets_what_it_gets_alone(model: Decoder, temperature: float) -> None:
    together = run(model, temperature=temperature, seed=5)
    for i, length in enumerate(LENGTHS):
        alone = generate(
            model,
            prompts()[i : i + 1, :length],
            [length],
            max_new_tokens=NEW,
            temperature=temperature,
            seed=5,
            rows=[i],
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])


def test_sampling_goes_by_the_seed(model: Decoder, greedy: GenerationResult) -> None:
    first, again, other = (run(model, temperature=1.5, seed=seed) for seed in (1, 1, 2**32 - 1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)
    # One prompt three times over: every row draws for itself.
    ids = np.repeat(prompts()[:1], 3, axis=0)
    same = generate(model, ids, [9] * 3, max_new_tokens=NEW, temperature=1.5).tokens
    assert len({row.tobytes() for row in same}) == 3
    # The log-probability is that of the token drawn, so no greater than that of the best one at the first step.
    assert (first.log_probs[:, 0] <= greedy.log_probs[:, 0] + 1e-6).all()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-20}])
def test_a_draw_from_one_token_is_greedy(model: Decoder, greedy: GenerationResult, settings: dict[str, Any]) -> None:
    np.testing.assert_array_equal(run(model, **({"temperature": 3.0} | settings)).tokens, greedy.tokens)


def first_place(row: np.ndarray, stop: list[int]) -> int:
    """Number of tokens up to and with the first one of ``stop``, or all."""
    hits = np.flatnonzero(np.isin(row, stop))
    return int(hits[0]) + 1 if len(hits) else len(row)


@pytest.mark.parametrize("count", [1, 3])
def test_a_row_ends_at_eos(model: Decoder, greedy: GenerationResult, count: int) -> None:
    stop = greedy.tokens[0, [4, 7, 1][:count]].tolist()
    result = run(model, eos_token_id=stop[0] if count == 1 else stop, pad_token_id=63)
    ends = [first_place(row, stop) for row in greedy.tokens]
    assert min(ends) < NEW
    np.testing.assert_array_equal(result.lengths, ends)
    for found, log_probs, expected, end in zip(result.tokens, result.log_probs, greedy.tokens, ends, strict=True):
        np.testing.assert_array_equal(found[:end], expected[:end])
        assert (found[end:] == 63).all()
        assert (log_probs[end:] == 0).all()


def test_each_row_has_its_own_limit(model: Decoder, greedy: GenerationResult) -> None:
    result = run(model, max_new_tokens=(3, 12, 1))
    np.testing.assert_array_equal(result.lengths, (3, 12, 1))
    for row, limit in enumerate((3, 12, 1)):
        np.testing.assert_array_equal(result.tokens[row, :limit], greedy.tokens[row, :limit])
        assert (result.tokens[row, limit:] == 0).all()


def test_the_loop_ends_when_every_row_has(
    model: Decoder, greedy: GenerationResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    real = Decoder.cached_hidden_states

    def counted(self: Decoder, *args: Any) -> Any:
        jax.debug.callback(lambda: passes.append(1))
        return real(self, *args)

    monkeypatch.setattr(Decoder, "cached_hidden_states", counted)
    # As many new tokens as no other test has, so that this is traced.
    result = run(model, max_new_tokens=50, eos_token_id=greedy.tokens[:, 2].tolist())
    jax.effects_barrier()
    assert len(passes) == result.lengths.max() <= 3


def test_settings_compile_nothing_anew(model: Decoder, greedy: GenerationResult) -> None:
    compiled = _generate._cache_size()
    for settings in (
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3},
        {"temperature": 1.1, "top_p": 0.2},
        {"eos_token_id": 3, "pad_token_id": 9, "max_new_tokens": 15},
        {"eos_token_id": (3, 4, 5), "max_new_tokens": (1, 2, 3)},
    ):
        run(model, **settings)
    run(model, (2, 16, 8, 3))
    assert _generate._cache_size() == compiled


def test_on_a_gpu_dense_layers_are_compiled_otherwise(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = init_decoder(QWEN2, jax.random.key(0))
    assert _program(dense) is _generate
    expected = run(dense)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert _program(model) is _generate
    otherwise = _program(dense)
    assert _program(two_segments()) is otherwise is not _generate
    monkeypatch.undo()
    monkeypatch.setattr("lotaqaf_jax.generation.loop._program", lambda model: otherwise)
    np.testing.assert_array_equal(run(dense).tokens, expected.tokens)


def test_sizes_are_few_and_never_much_larger() -> None:
    assert [bucket(size, 1) for size in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 16]
    sizes = {bucket(size, 16, 4) for size in range(1, 4097)}
    assert len(sizes) <= 8 * 4
    for size in range(1, 4097):
        assert size <= bucket(size, 16, 4) <= max(1.25 * size, size + 15)
        assert bucket(bucket(size, 16, 4), 16, 4) == bucket(size, 16, 4)


def test_the_cache_exists_once() -> None:
    """Memory grows with the slots by one cache and one layer's part of it: no copy is made in the loop."""
    layers, batch = 8, 2
    config = dataclasses.replace(QWEN2, num_hidden_layers=layers)
    graph, state = nnx.split(nnx.eval_shape(lambda: quantized_decoder(config)))

    def int32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    number = jax.ShapeDtypeStruct((), jnp.float32)
    sampling = Sampling(number, int32(), number, jax.ShapeDtypeStruct((), jnp.uint32))

    def memory(new: int) -> int:
        row = int32(batch)
        arguments = (int32(batch, 16), row, row, row, int32(4), int32(), sampling)
        lowered = _generate.lower(graph, state, *arguments, new=new)
        # Not optimised, which is quicker; what is copied does not depend on it.
        return lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis().temp_size_in_bytes

    slot = 2 * layers * batch * config.num_key_value_heads * config.head_dim * 4
    growth = (memory(5120) - memory(1024)) / 4096
    assert 1 <= growth / slot < 1.25


def test_a_write_changes_its_slots_alone() -> None:
    cache = KVCache.empty(3, 2, 2, 6, 4, jnp.bfloat16)
    new = jnp.arange(2 * 2 * 2 * 4, dtype=jnp.float32).reshape(2, 2, 2, 4) + 1
    written = cache.write(new, -new, jnp.int32(1), 3)
    keys, values = written.keys[1], written.values[1]
    assert written.keys.dtype == jnp.bfloat16
    np.testing.assert_array_equal(keys[:, :, 3:5], jnp.swapaxes(new, 1, 2))
    np.testing.assert_array_equal(values, -keys)
    assert int(jnp.sum(written.keys != 0)) == new.size


def test_keys_values_and_activations_are_of_the_models_type() -> None:
    model = quantized_decoder(LLAMA, QuantSpec(8, -1), dtype=jnp.bfloat16)
    ids, valid = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 6), bool)
    found = jax.eval_shape(lambda: model.cached_hidden_states(ids, ids, model.empty_cache(2, 6), 0, valid))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


ERRORS: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
    (ConfigError, r"temperature: found -1, expected 0 for greedy", {"temperature": -1}),
    (ConfigError, r"temperature: found nan", {"temperature": float("nan")}),
    (ConfigError, r"top_k: found 0, expected a whole number from 1 on", {"top_k": 0}),
    (ConfigError, r"top_k: found 2\.5", {"top_k": 2.5}),
    (ConfigError, r"top_p: found 0\.0, expected a probability above 0 and at most 1", {"top_p": 0.0}),
    (ConfigError, r"top_p: found 1\.2", {"top_p": 1.2}),
    (ConfigError, r"seed: found -1, expected a whole number from 0", {"seed": -1}),
    (ConfigError, r"max_new_tokens: found 0, expected a whole number from 1 on", {"max_new_tokens": 0}),
    (ConfigError, r"max_new_tokens: found True", {"max_new_tokens": (True, 2, 3)}),
    (ConfigError, r"eos_token_id: found -2, expected a token id", {"eos_token_id": -2}),
    (
        DataError,
        r"prompt 0: 9 tokens and 88 new ones, expected together at most the model's max_position_embeddings, 96\.",
        {"max_new_tokens": 88},
    ),
    (DataError, r"prompt 70: 4 tokens and 93 new", {"max_new_tokens": (1, 93, 1), "rows": (3, 70, 4)}),
    (DataError, r"prompt 1 is empty, expected at least one token", {"lengths": (9, 0, 1)}),
    (DataError, r"prompt 2: token 1 is -7, expected ids from 0 to 63", {"lengths": (9, 4, 2)}),
    (ValueError, r"lengths go up to 10, but input_ids have 9 columns", {"lengths": (10, 4, 1)}),
    (ValueError, r"lengths \(2,\)", {"lengths": (9, 4)}),
    (ValueError, r"2 numbers for 3 rows", {"max_new_tokens": (3, 4)}),
)


@pytest.mark.parametrize(("kind", "message", "settings"), ERRORS, ids=[message[:24] for _, message, _ in ERRORS])
def test_what_cannot_be_done_is_said(
    model: Decoder, kind: type[Exception], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(kind, match=message):
        generate(model, prompts(), **({"lengths": LENGTHS, "max_new_tokens": NEW} | settings))
