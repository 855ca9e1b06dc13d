"""Models, tokenizers and readers for the tests of target gguf."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from lotaqaf_jax.models import Decoder, DecoderConfig, QuantSpec, add_adapters, linears, merge
from tests.convert.making import checkpoint
from tests.models.tiny import quantized_decoder, set_random_adapters

SIZES = {"vocab_size": 330, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 3e-6}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 5e5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def config(model_type: str = "llama", **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({"model_type": model_type, "tie_word_embeddings": False} | SIZES | changes)


def merged(made: DecoderConfig, quant: QuantSpec) -> Decoder:
    """A model with an offset."""
    model = add_adapters(quantized_decoder(made, quant), 8, 3.0, "reference")
    set_random_adapters(model)
    return merge(model)


def tokenizer_folder() -> Path:
    found = checkpoint("tokenizer")
    assert found is not None
    return found


def changed_tokenizer(folder: Path, **changes: Any) -> Path:
    """The tiny models' tokenizer with other parts."""
    shutil.copytree(tokenizer_folder(), folder)
    said = json.loads((folder / "tokenizer.json").read_text())
    model = changes.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(said | changes | {"model": said["model"] | model}))
    return folder


def split(digits: str, use_regex: bool = False) -> dict[str, Any]:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    first = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [first, level]}


def read(folder: Path) -> gguf.GGUFReader:
    """The file of an exported folder."""
    return gguf.GGUFReader(folder / "model.gguf")


def tensors(folder: Path) -> dict[str, tuple[Kind, np.ndarray]]:
    """Type and numbers of every tensor, as the package reads them."""
    return {t.name: (t.tensor_type, gguf.quants.dequantize(t.data, t.tensor_type)) for t in read(folder).tensors}


def hugging_face_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """q or k of llama.cpp as Hugging Face has it: of each head, the even outputs before the odd."""
    return np.concatenate([part for head in np.split(array, heads) for part in (head[0::2], head[1::2])])


def module_weights(folder: Path, model: Decoder) -> dict[str, np.ndarray]:
    """The weight of every module as the file has it, (out, in) float32, in the rows of the Hugging Face model."""
    found, weights = tensors(folder), {}
    for names, _ in linears(model):
        for name in names:
            layer, _, part = name.removeprefix("model.layers.").partition(".")
            values = found[f"blk.{layer}.{NAMES[part]}.weight"][1]
            weights[name] = (
                hugging_face_rows(values, heads(model.config, part)) if heads(model.config, part) else values
            )
    return weights


def heads(made: DecoderConfig, part: str) -> int:
    """Heads of a module whose rows llama.cpp has in another order; 0 for others."""
    if made.model_type != "llama":
        return 0
    return {"self_attn.q_proj": made.num_attention_heads, "self_attn.k_proj": made.num_key_value_heads}.get(part, 0)
