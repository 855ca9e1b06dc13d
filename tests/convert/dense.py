"""Random 16-bit models in folders, to be quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import convert
from lotaqaf_jax.models import DecoderConfig, init_decoder
from tests.data.conftest import byte_tokenizer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,  # no multiple of 32, the size of a group and a period of 3-bit words
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
}
LLAMA = {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 80}
# Square, so that one program quantises all of its projections: most of the time here is compilation.
QWEN = {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 6, "intermediate_size": 48}


def write_model(folder: Path, changes: dict[str, Any], dtype: Any = jnp.float16, seed: int = 0) -> Path:
    """A random 16-bit model with biases, norms that are not 1, and inputs of very different sizes."""
    config = DecoderConfig.from_hf(SIZES | changes)
    model = init_decoder(config, jax.random.key(seed), dtype=dtype, scale=0.2)
    rng = np.random.default_rng(seed)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and (path[-1] == "bias" or "norm" in str(path[-2])):
            shape = variable.get_value().shape
            value = rng.normal(0, 0.2, shape) if path[-1] == "bias" else np.exp(rng.normal(0, 0.7, shape))
            variable.set_value(jnp.asarray(value, dtype))
    convert.write_checkpoint(model, folder, config={"eos_token_id": 7}, progress=False)
    byte_tokenizer().save_pretrained(folder)
    return folder
