"""``load_pretrained`` on real folders: the logits that other people's software wrote beside them."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.models import linears, load_pretrained
from lotaqaf_jax.models.pretrained import default_dtype
from lotaqaf_jax.quant import decode_zeros, encode_zeros

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
OURS = sorted(path.name for path in CHECKPOINTS.glob("ckpt-*"))
# Those of the shared folder that the repository has no copy of.
MORE = (
    "ckpt-hfq-llama-b4g32-asym-desc",
    "ckpt-llama-b4g32-sym",
    "ckpt-llamapos-b4g32-asym-v2",
    "ckpt-sharded-llama-b4g32-sym",
)


def check_logits(folder: Path, logits: Path) -> None:
    expected = np.load(logits)
    found = load_pretrained(folder, dtype=jnp.float32, progress=False)(jnp.asarray(expected["input_ids"]))
    assert np.abs(found - expected["logits_ref_fp32"]).max() <= 1e-4


@pytest.mark.parametrize("name", OURS)
def test_logits_of_a_real_checkpoint(name: str) -> None:
    check_logits(CHECKPOINTS / name, CHECKPOINTS / name / "logits.npz")


@pytest.mark.parametrize("name", MORE)
def test_logits_of_a_shared_checkpoint(shared: Path, name: str) -> None:
    formats = shared / "checkpoints" / "format"
    # The sharded folder holds the tensors of the unsharded one and no logits of its own.
    check_logits(formats / name, formats / name.replace("sharded-", "") / "logits.npz")


def test_every_shared_checkpoint_is_tried(shared: Path) -> None:
    found = {path.name for path in (shared / "checkpoints" / "format").glob("ckpt-*")}
    assert found == {*OURS, *MORE, "ckpt-llama-b3g32-planar"}


def test_the_planar_checkpoint_is_refused_by_name(shared: Path) -> None:
    with pytest.raises(ConfigError, match=r"ckpt-llama-b3g32-planar/config\.json.*'gptq_p' \(bit-planar words"):
        load_pretrained(shared / "checkpoints" / "format" / "ckpt-llama-b3g32-planar")


def test_the_same_model_in_v2_and_in_shards_gives_the_same_bits(tmp_path: Path) -> None:
    """A v1 checkpoint whose zeros carry borrows, rewritten as ``gptq_v2`` in two shards with an index."""
    source = CHECKPOINTS / "ckpt-llamapos-b4g32-asym"
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("qzeros")]:
        out = tensors[name.replace("qzeros", "scales")].shape[1]
        zeros = decode_zeros(tensors[name], 4, out, "gptq")
        tensors[name] = np.asarray(encode_zeros(zeros, 4, "gptq_v2"))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    ids = jnp.asarray(np.load(source / "logits.npz")["input_ids"])
    one, other = (load_pretrained(folder, progress=False)(ids) for folder in (source, tmp_path))
    np.testing.assert_array_equal(one, other)


def story_rows(shared: Path, folder: Path) -> tuple[jax.Array, jax.Array]:
    """The first 256 characters of 60 stories, and which of them are there."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with gzip.open(shared / "data" / "text" / "tinystories_sample.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].replace("\n", " ") for line in itertools.islice(lines, 0, 300, 5)]
    rows = [tokenizer.encode(text).ids[:256] for text in texts]
    ids, there = np.zeros((60, 256), np.int32), np.zeros((60, 256), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        there[i, : len(row)] = True
    return jnp.asarray(ids), jnp.asarray(there)


@pytest.mark.parametrize(("bits", "published"), [(4, 0.843), (2, 1.4)])
def test_a_trained_model_has_the_loss_its_makers_measured(shared: Path, bits: int, published: float) -> None:
    """Nats per token on stories; measured on 300 of them (none was published for 2 bit), compared on every fifth."""
    folder = shared / "checkpoints" / f"babyllama105-gptq-w{bits}g32-asym"
    ids, there = story_rows(shared, folder)
    logprobs = jax.nn.log_softmax(load_pretrained(folder, dtype=jnp.float32, progress=False)(ids)[:, :-1])
    taken = jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1)[..., 0]
    loss = -jnp.mean(taken, where=there[:, 1:])
    assert abs(loss - published) < 0.03


def test_the_type_of_the_computation() -> None:
    assert default_dtype() == (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    model = load_pretrained(CHECKPOINTS / OURS[0], dtype=jnp.bfloat16, progress=False)
    assert model.dtype == jnp.bfloat16
    assert next(linears(model))[1].packed.scales.dtype == jnp.float16, "stored weights keep their type"


def test_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(CHECKPOINTS / OURS[0], folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"copy/model\.safetensors: not a whole safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"copy: no model\.safetensors and no model\.safetensors\.index\.json"):
        load_pretrained(folder)
