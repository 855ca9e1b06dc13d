"""The decoder against transformers' Llama and Qwen2, part by part and whole, with random weights in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lotaqaf_jax.models import Decoder, load_pretrained
from lotaqaf_jax.models.decoder import Block, causal
from lotaqaf_jax.models.rope import inverse_frequencies, rope_angles

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
# Scaled so that short, middle and long waves all occur within a head of 8.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 700.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rms_norm_eps": 1e-3}),
    "llama-scaled-biased-tied": (
        "llama",
        {
            "rope_parameters": LLAMA3,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 16,
        },
    ),
    "qwen2-theta-untied": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
}


def build(kind: str, changes: dict[str, Any]) -> Any:
    """A random transformers model, with norms and biases that are not 1 and 0."""
    torch.manual_seed(0)
    settings = SIZES | {"tie_word_embeddings": False} | changes
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval().float()


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder, Path]:
    """The torch model, and what our loader makes of its folder."""
    theirs = build(*MODELS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder, dtype=jnp.float32, progress=False), folder


def tokens(batch: int = 2, length: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (batch, length))


def their_logits(model: Any, ids: np.ndarray, **keywords: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids), **keywords).logits.numpy()


def test_logits(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    expected = their_logits(theirs, tokens())
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours(jnp.asarray(tokens())), expected, rtol=2e-5, atol=2e-5)


def test_rotary_frequencies(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    expected = theirs.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(ours.config), expected, rtol=1e-6)


def test_the_old_spelling_of_rope_gives_the_same_logits(pair: tuple[Any, Decoder, Path], tmp_path: Path) -> None:
    theirs, _, folder = pair
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    ours = load_pretrained(tmp_path, dtype=jnp.float32, progress=False)
    np.testing.assert_allclose(ours(jnp.asarray(tokens())), their_logits(theirs, tokens()), rtol=2e-5, atol=2e-5)


def one_layer(model: Decoder, index: int) -> Block:
    """Layer ``index`` taken out of the stack."""
    graph, stacked = nnx.split(model.segments[0])
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], stacked))


def watched(model: Any, ids: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Input and output of the parts of the torch model's layer 1, by name."""
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: Any, args: Any, keywords: Any, output: Any) -> None:
            first = args[0] if args else keywords["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            seen[name] = first.numpy(), result.numpy()

        return keep

    layer = model.model.layers[1]
    parts = {name: getattr(layer, name) for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")}
    parts |= {"block": layer, "norm": model.model.norm}
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in parts.items()]
    their_logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("pair", ["llama-scaled-biased-tied", "qwen2-theta-untied"], indirect=True)
def test_part_by_part(pair: tuple[Any, Decoder, Path]) -> None:
    """Norms, attention, MLP and the whole block of one layer, each fed what the torch layer was fed."""
    theirs, ours, _ = pair
    ids = tokens()
    seen = watched(theirs, ids)
    layer = one_layer(ours, 1)
    rope = rope_angles(jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), ours.config)
    parts: dict[str, Callable[[jax.Array], jax.Array]] = {
        "input_layernorm": layer.input_layernorm,
        "self_attn": lambda x: layer.self_attn(x, causal(rope))[0],
        "post_attention_layernorm": layer.post_attention_layernorm,
        "mlp": layer.mlp,
        "block": lambda x: layer(x, causal(rope))[0],
        "norm": ours.norm,
    }
    assert set(seen) == set(parts)
    for name, part in parts.items():
        given, expected = seen[name]
        scale = np.abs(expected).max()
        found = jax.jit(part)(jnp.asarray(given))
        np.testing.assert_allclose(found / scale, expected / scale, atol=3e-6, err_msg=name)


def test_packed_rows_are_the_torch_models_separate_rows(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    lengths = (13, 20, 7)
    ids = tokens(1)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat([1, 2, 3], lengths)[None]
    found = ours(jnp.asarray(ids), jnp.asarray(positions), jnp.asarray(segments))
    for start, stop in ((0, 13), (13, 33), (33, 40)):
        expected = their_logits(theirs, ids[:, start:stop])
        np.testing.assert_allclose(found[:, start:stop], expected, rtol=3e-5, atol=3e-5)
