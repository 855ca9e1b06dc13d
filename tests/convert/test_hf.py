"""HF -> JAX -> HF: the same tensors, the same model, and configs that say the same."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import convert.shards
import lotaqaf_jax
from convert.hf_config import model_config
from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.models import DecoderConfig, init_decoder, linears
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import CHECKPOINTS, checkpoint

NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if (path / "config.json").is_file())
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)


def assert_same_tensors(one: CheckpointFolder, two: CheckpointFolder) -> None:
    assert one.tensors.keys() == two.tensors.keys()
    for name, entry in one.tensors.items():
        assert entry.dtype == two.tensors[name].dtype, name
        np.testing.assert_array_equal(one.read(name), two.read(name), err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_keeps_every_tensor(name: str, tmp_path: Path) -> None:
    source = CheckpointFolder(CHECKPOINTS / name)
    model = lotaqaf_jax.load_pretrained(source.path, progress=False)
    convert.write_checkpoint(model, tmp_path / "out", config=source.config, tokenizer_from=source.path, progress=False)
    written = CheckpointFolder(tmp_path / "out")
    assert_same_tensors(source, written)
    assert written.config == source.config


@pytest.mark.parametrize("name", NAMES)
def test_config_made_from_the_model_describes_it(name: str, tmp_path: Path) -> None:
    model = lotaqaf_jax.load_pretrained(CHECKPOINTS / name, progress=False)
    convert.write_checkpoint(model, tmp_path / "out", progress=False)
    again = lotaqaf_jax.load_pretrained(tmp_path / "out", progress=False)
    assert again.config == model.config
    np.testing.assert_array_equal(model(IDS), again(IDS))
    said = CheckpointFolder(tmp_path / "out").config["quantization_config"]
    weight = next(linear.packed for _, linear in linears(model) if linear.is_quantized)
    assert said["checkpoint_format"] == weight.checkpoint_format
    # GPTQModel reads asymmetric weights in v1 from itself alone.
    v1 = convert.check_runtime(tmp_path / "out", "gptqmodel")
    assert v1.loads, v1.reasons
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == said


def tiny(model_type: str = "llama", **changes: object) -> DecoderConfig:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5e5}
    return DecoderConfig.from_hf({"model_type": model_type} | sizes | heads | changes)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny("qwen2", tie_word_embeddings=True),
        tiny(attention_bias=True, mlp_bias=True, head_dim=16),
        tiny(rope_parameters=LLAMA3),
    ],
    ids=["llama", "qwen2-tied", "biases", "llama3"],
)
def test_config_is_read_as_it_was_written_here_and_by_transformers(config: DecoderConfig) -> None:
    from transformers import AutoConfig

    written = model_config(config, jnp.bfloat16)
    assert DecoderConfig.from_hf(written) == config
    theirs = AutoConfig.for_model(**written)
    assert (theirs.hidden_size, theirs.num_key_value_heads) == (config.hidden_size, config.num_key_value_heads)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_dense_model_computes_the_same_in_transformers(
    model_type: str, dtype: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several shards, with ids of special tokens and a tokenizer."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(convert.shards, "SHARD_BYTES", 20_000)
    model = init_decoder(tiny(model_type), jax.random.key(0), dtype=dtype, scale=0.1)
    folder = tmp_path / "out"
    tokenizer = checkpoint("tokenizer")
    convert.write_checkpoint(model, folder, config={"eos_token_id": 7}, tokenizer_from=tokenizer, progress=False)
    assert len(CheckpointFolder(folder).shards) > 1
    assert (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 7
    assert not (folder / "quantize_config.json").exists()

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS).long()).logits.numpy()
    found = lotaqaf_jax.load_pretrained(folder, dtype=jnp.float32, progress=False)(IDS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_contradicting_config_is_refused(tmp_path: Path) -> None:
    model = init_decoder(tiny(), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"hidden_size 64 \(the model: 32\)"):
        convert.write_checkpoint(model, tmp_path / "out", config={"hidden_size": 64, "head_dim": 8})
    packed = lotaqaf_jax.load_pretrained(CHECKPOINTS / NAMES[0], progress=False)
    config = CheckpointFolder(CHECKPOINTS / NAMES[0]).config
    wrong = config | {"quantization_config": config["quantization_config"] | {"group_size": 64}}
    with pytest.raises(ConfigError, match="quantization_config says"):
        convert.write_checkpoint(packed, tmp_path / "out", config=wrong)
    with pytest.raises(CheckpointError, match="no such folder"):
        convert.write_checkpoint(model, tmp_path / "out", tokenizer_from=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
