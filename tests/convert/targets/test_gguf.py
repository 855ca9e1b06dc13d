"""Target gguf: the file, read by the package gguf, is the model."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
from convert.targets import GGUF
from convert.targets.gguf import head_rows, q4_1_blocks, rope_factors
from convert.targets.gguf_metadata import read_tokenizer
from convert.targets.host import HostWeight
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.models import Decoder, QuantSpec, linears
from lotaqaf_jax.models.rope import inverse_frequencies
from tests.convert.targets.gguf_making import (
    LLAMA3,
    NAMES,
    changed_tokenizer,
    config,
    heads,
    hugging_face_rows,
    merged,
    module_weights,
    read,
    split,
    tensors,
    tokenizer_folder,
)
from tests.models.tiny import quantized_decoder
from tests.peer import dense_matrix


def save(model: Decoder, folder: Path, **options: Any) -> convert.ExportReport:
    options = {"tokenizer_from": tokenizer_folder(), "allow_lossy": True, "progress": False} | options
    return convert.save_pretrained(model, folder, target="gguf", **options)


def fields(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in read(folder).fields.items()}


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([32, 64, 96]),
    moved=st.booleans(),
    scale=st.sampled_from([1e-4, 0.01, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_decode_to_the_weight(bits: int, group_size: int, moved: bool, scale: float, seed: int) -> None:
    """To the rounding of the minima; without an offset exactly, except for 4-bit zero points that are no power of 2."""
    rng = np.random.default_rng(seed)
    g_idx = np.arange(96) // group_size
    shape = (g_idx[-1] + 1, 5)
    weight = HostWeight(
        integers=rng.integers(0, 2**bits, (96, 5)).astype(np.uint8),
        scales=(scale * rng.uniform(0.1, 1, shape)).astype(np.float16),
        zeros=rng.integers(0, 2**bits, shape).astype(np.uint8),
        offset=(moved * rng.uniform(-0.5, 0.5, shape)).astype(np.float32),
        g_idx=g_idx,
        bits=bits,
        group_size=group_size,
    )
    steps = weight.spread(weight.scales.astype(np.float64))
    wanted = steps * (weight.integers + weight.spread(weight.offset - weight.zeros.astype(np.float64)))
    found = gguf.quants.dequantize(q4_1_blocks(weight), Kind.Q4_1).T
    # Half of float16's last place, where it is normal and where it is not, and float32, in which the reader computes.
    allowed = 2.0**-11 * 16 * np.abs(steps) + 2.0**-25 + 2.0**-20 * np.abs(steps)
    assert np.all(np.abs(found - wanted) <= allowed)
    if not moved:
        even = (weight.zeros & (weight.zeros - 1)) == 0
        exact = weight.spread(even | (bits < 4)) & (steps > 2.0**-14)
        np.testing.assert_allclose(found[exact], wanted[exact], rtol=0, atol=2.0**-20 * scale)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(("bits", "group_size", "tied"), [(4, 32, True), (3, 64, False), (2, 32, True), (4, -1, False)])
def test_every_tensor_of_the_model_is_in_the_file(
    model_type: str, bits: int, group_size: int, tied: bool, tmp_path: Path
) -> None:
    """Of 96 inputs in groups of 64 the last group is short, which blocks do not mind."""
    made = config(model_type, tie_word_embeddings=tied, head_dim=32, attention_bias=True)
    model = merged(made, QuantSpec(bits, group_size))
    report = save(model, tmp_path / "out")
    found, weights = tensors(tmp_path / "out"), module_weights(tmp_path / "out", model)

    def take(name: str, kind: Kind) -> np.ndarray:
        assert found[name][0] == kind, name
        return found.pop(name)[1]

    errors = {}
    for names, linear in linears(model):
        for i, name in enumerate(names):
            layer, _, part = name.removeprefix("model.layers.").partition(".")
            take(f"blk.{layer}.{NAMES[part]}.weight", Kind.Q4_1)
            weight, values = linear.packed, weights[name]
            group = np.arange(weight.shape[0]) // (group_size if group_size > 0 else weight.shape[0])
            step = np.asarray(weight.scales[i], np.float64)[group]
            errors[name] = float(np.max(np.abs(values - dense_matrix(linear, i).astype(np.float64)).T / step))
            if linear.bias is not None:
                bias = take(f"blk.{layer}.{NAMES[part]}.bias", Kind.F32)
                bias = hugging_face_rows(bias, heads(made, part)) if heads(made, part) else bias
                np.testing.assert_array_equal(bias, linear.bias.get_value()[i])
    assert report.errors == pytest.approx(errors, abs=2e-5)
    assert 1e-4 < report.largest[1] < 2.0**-11 * 2**bits
    for segment, (start, count) in zip(model.segments, model.spec.runs(), strict=True):
        for i in range(count):
            for theirs, ours in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
                values = take(f"blk.{start + i}.{theirs}.weight", Kind.F32)
                np.testing.assert_array_equal(values, getattr(segment, ours).weight.get_value()[i])
    np.testing.assert_array_equal(take("output_norm.weight", Kind.F32), model.norm.weight.get_value())
    np.testing.assert_array_equal(take("token_embd.weight", Kind.F16), model.embed_tokens.weight.get_value())
    if not tied:
        assert model.lm_head is not None
        np.testing.assert_array_equal(take("output.weight", Kind.F16), model.lm_head.weight.get_value())
    assert not found


def test_rows_of_a_head_become_neighbours() -> None:
    assert head_rows(2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", Kind.BF16), ("float32", Kind.F32), ("float16", Kind.F16)])
def test_matrices_keep_their_type(dtype: str, kind: Kind, tmp_path: Path) -> None:
    model = quantized_decoder(config(), QuantSpec(4, 32))
    wide = model.embed_tokens.weight.get_value().astype(dtype)
    model.embed_tokens.weight.set_value(wide)
    save(model, tmp_path / "out")
    found, values = tensors(tmp_path / "out")["token_embd.weight"]
    assert found == kind
    np.testing.assert_array_equal(values, np.asarray(wide, np.float32))


def test_sizes_and_constants(tmp_path: Path) -> None:
    for model_type in ("llama", "qwen2"):
        save(quantized_decoder(config(model_type, head_dim=32), QuantSpec(4, 32)), tmp_path / model_type)
        found = fields(tmp_path / model_type)
        assert found["general.architecture"] == model_type
        assert found["general.name"] == model_type
        assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
        assert found["general.quantization_version"] == 2
        wanted = {
            "vocab_size": 330,
            "context_length": 128,
            "embedding_length": 64,
            "block_count": 2,
            "feed_forward_length": 96,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.layer_norm_rms_epsilon": np.float32(3e-6),
            "rope.dimension_count": 32,
            "rope.freq_base": 5e5,
        }
        assert {key: found[f"{model_type}.{key}"] for key in wanted} == wanted


def test_scaled_frequencies_are_a_tensor(tmp_path: Path) -> None:
    """llama.cpp divides by it: pairs that turn often in 8192 positions by 1, less than once by 8, others between."""
    made = config(rope_parameters={"rope_theta": 5e5} | LLAMA3, head_dim=32)
    save(quantized_decoder(made, QuantSpec(4, 32)), tmp_path / "out")
    kind, factors = tensors(tmp_path / "out")["rope_freqs.weight"]
    assert kind == Kind.F32
    wanted = []
    for i in range(16):
        turns = 8192 * 5e5 ** (-2 * i / 32) / (2 * math.pi)
        smooth = (turns - 1) / (4 - 1)
        wanted.append(1.0 if turns > 4 else 8.0 if turns < 1 else 1 / ((1 - smooth) / 8 + smooth))
    assert sum(1 < factor < 8 for factor in wanted) == 1
    np.testing.assert_allclose(factors, wanted, rtol=1e-5)
    plain = inverse_frequencies(dataclasses.replace(made, rope_scaling=None))
    np.testing.assert_allclose(plain / factors, inverse_frequencies(made), rtol=1e-6)
    assert rope_factors(config()) is None


def test_scaled_frequencies_of_other_models_are_refused(tmp_path: Path) -> None:
    model = quantized_decoder(config("qwen2", rope_parameters={"rope_theta": 5e5} | LLAMA3), QuantSpec(4, 32))
    with pytest.raises(ConfigError, match="llama3"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounded_minima_are_refused_unless_allowed(tmp_path: Path) -> None:
    model = merged(config(), QuantSpec(4, 32))
    with pytest.raises(ConfigError, match=r"off by up to 0\.00.*allow-lossy"):
        save(model, tmp_path / "out", allow_lossy=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [2, 3])
def test_without_an_offset_it_is_exact(bits: int, tmp_path: Path) -> None:
    report = save(quantized_decoder(config(), QuantSpec(bits, 32)), tmp_path / "out", allow_lossy=False)
    assert report.exact


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = quantized_decoder(config(), QuantSpec(4, 32))
    _, linear = next(iter(linears(model)))
    scales = jnp.full(linear.packed.scales.shape, 1e5, jnp.float32)
    linear.weight.set_value(dataclasses.replace(linear.packed, scales=scales))
    with pytest.raises(ConfigError, match="beyond its range"):
        save(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        (QuantSpec(8, 32), "8 bit"),
        (QuantSpec(4, 16), "groups of 16 rows"),
        (QuantSpec(4, 32, act_order=True), "act-order"),
    ],
)
def test_what_blocks_cannot_hold_is_refused(quant: QuantSpec, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        save(quantized_decoder(config(), quant), tmp_path / "out")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    model = quantized_decoder(config(intermediate_size=80), QuantSpec(4, -1))
    with pytest.raises(ConfigError, match=r"80 inputs, it holds multiples of 32 \(model\.layers\.0\.mlp\.down_proj"):
        save(model, tmp_path / "out")


def test_size_is_that_of_the_tensors(tmp_path: Path) -> None:
    model = quantized_decoder(config(), QuantSpec(4, 32))
    save(model, tmp_path / "out")
    source: Any = None
    assert GGUF.size(model, source) == sum(int(t.n_bytes) for t in read(tmp_path / "out").tensors)


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'lotaqaf_jax\[export\]'"):
        save(quantized_decoder(config(), QuantSpec(4, 32)), tmp_path / "out")


def test_tokenizer(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path / "tokenizer")
    said = json.loads((folder / "tokenizer.json").read_text())
    said["added_tokens"].append({"id": 320, "content": "<tool>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(said))
    settings_ = json.loads((folder / "tokenizer_config.json").read_text())
    settings_ |= {"chat_template": "{{ messages }}", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    save(quantized_decoder(config(), QuantSpec(4, 32)), tmp_path / "out", tokenizer_from=folder)
    found = fields(tmp_path / "out")
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    by_id = {id_: token for token, id_ in said["model"]["vocab"].items()}
    padding = [f"[PAD{i}]" for i in range(321, 330)]
    assert found["tokenizer.ggml.tokens"] == [by_id[i] for i in range(320)] + ["<tool>", *padding]
    kinds = gguf.TokenType
    types = [kinds.CONTROL] * 4 + [kinds.NORMAL] * 316 + [kinds.USER_DEFINED] + [kinds.UNUSED] * 9
    assert found["tokenizer.ggml.token_type"] == types
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in said["model"]["merges"]]
    ids = {"bos": 1, "eos": 2, "unknown": 0, "padding": 3}
    assert {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ids} == ids
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def bos_template() -> dict[str, Any]:
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    bos: dict[str, Any] = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    return {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text], "special_tokens": special}


@pytest.mark.parametrize(("changes", "added"), [({}, False), ({"post_processor": bos_template()}, True)])
def test_bos_is_added_where_the_tokenizer_adds_it(changes: dict[str, Any], added: bool, tmp_path: Path) -> None:
    """llama.cpp adds it to every text in words of Llama 3, unless the file says not to."""
    folder = changed_tokenizer(tmp_path / "tokenizer", pre_tokenizer=split(r"\p{N}{1,3}"), **changes)
    save(quantized_decoder(config(), QuantSpec(4, 32)), tmp_path / "out", tokenizer_from=folder)
    assert fields(tmp_path / "out")["tokenizer.ggml.add_bos_token"] is added


@pytest.mark.parametrize(("digits", "name"), [(r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2")])
def test_how_text_is_cut_goes_by_name(digits: str, name: str, tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path / "tokenizer", pre_tokenizer=split(digits), normalizer={"type": "NFC"})
    found = read_tokenizer(folder, 330)
    assert found is not None
    assert found.pre == name


@pytest.mark.parametrize("pre_tokenizer", [split(r"\p{N}{1,2}"), split(r"\p{N}", use_regex=True)])
def test_an_unknown_cut_is_warned_of(pre_tokenizer: dict[str, Any], tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path / "tokenizer", pre_tokenizer=pre_tokenizer)
    with pytest.warns(UserWarning, match="may give other tokens"):
        found = read_tokenizer(folder, 330)
    assert found is not None
    assert found.pre == "default"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"type": "Unigram"}}, "'Unigram'"),
        ({"pre_tokenizer": None}, "SentencePiece"),
        ({"model": {"byte_fallback": True}}, "SentencePiece"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "Lowercase"),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path / "tokenizer", **changes)
    with pytest.raises(ConfigError, match=f"tokenizer.json.*{said}.*copy of the folder without"):
        read_tokenizer(folder, 330)


def test_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="a token with id 319, the model has 300"):
        read_tokenizer(tokenizer_folder(), 300)


def test_tokenizer_of_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        read_tokenizer(tmp_path, 330)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no tokenizer beside it"):
        save(quantized_decoder(config(), QuantSpec(4, 32)), tmp_path / "out", tokenizer_from=None)
    found = fields(tmp_path / "out")
    assert found["tokenizer.ggml.model"] == "no_vocab"
    assert "tokenizer.ggml.tokens" not in found
