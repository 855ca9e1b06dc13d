"""``load_pretrained``: a folder or a name in, a model out; and a random model for training from scratch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.decoder import Decoder
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.models.registry import local_folder
from lotaqaf_jax.models.spec import dense_spec
from lotaqaf_jax.quant.folder import CheckpointFolder

__all__ = ["default_dtype", "init_decoder", "load_pretrained", "load_tokenizer"]


def default_dtype() -> Any:
    """bfloat16 where the device has fast units for it, float32 on a CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def load_pretrained(path_or_name: str | Path, *, dtype: Any = None, progress: bool = True) -> Decoder:
    """Load a quantised (GPTQ, AWQ, compressed-tensors, MLX) or 16-bit Llama or Qwen2 checkpoint.

    Args:
        path_or_name: a folder, a known name such as ``qwen2.5-14b-gptq``, or a hub name.
        dtype: the type that activations and dequantised weights are computed in; None for float32 on a CPU and
            bfloat16 elsewhere. Stored weights keep their own types.
        progress: show a progress bar when it takes longer than a second.

    Returns:
        The model; ``model(input_ids)`` gives logits (batch, length, vocab).

    Raises:
        CheckpointError: the checkpoint is missing, damaged or does not fit its config.
        ConfigError: an architecture or quantisation format that cannot be computed exactly.
    """
    folder = CheckpointFolder(local_folder(path_or_name))
    if (folder.path / "offset_adapter").is_dir():
        warnings.warn(
            f"{folder.path}: offset_adapter beside the model is not applied, so its zero points are those of the base. "
            "Use convert.load_merged to load the merged model with its offsets.",
            stacklevel=2,
        )
    return load_decoder(folder, default_dtype() if dtype is None else dtype, progress=progress)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a checkpoint folder, by transformers' ``AutoTokenizer``; nothing is downloaded.

    Raises:
        CheckpointError: the folder holds no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as problem:  # A dozen unrelated types, down to KeyError, for a file that is missing or odd.
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read ({type(problem).__name__}: {problem}). Put tokenizer.json and "
            "tokenizer_config.json of the model into the folder."
        ) from problem


def init_decoder(config: DecoderConfig, key: jax.Array, *, dtype: Any = jnp.float32, scale: float = 0.02) -> Decoder:
    """A decoder with dense random weights: every matrix normal of deviation ``scale``, norms 1, biases 0.

    Args:
        config: the decoder.
        key: JAX random key.
        dtype: type of weights and activations.
        scale: standard deviation.
    """
    decoder = Decoder(config, dense_spec(config, dtype), dtype)
    for path, variable in nnx.iter_graph(decoder):
        if not isinstance(variable, nnx.Param) or path[-1] != "weight" or "norm" in str(path[-2]):
            continue
        key, draw = jax.random.split(key)
        array = variable.get_value()
        variable.set_value((scale * jax.random.normal(draw, array.shape)).astype(array.dtype))
    return decoder
