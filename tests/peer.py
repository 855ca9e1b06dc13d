"""A decoder's weights, dequantised, in transformers' model of torch, with its adapters in PEFT's LoRA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.hf_config import model_config
from lotaqaf_jax.kernels import LowRank
from lotaqaf_jax.models import Decoder, adapted_linears, linears
from lotaqaf_jax.models.layers import Linear


def dense_matrix(linear: Linear, i: int) -> np.ndarray:
    """W of layer i of a stack, (out, in) float32."""
    if linear.is_quantized:
        return np.asarray(jax.tree.map(lambda leaf: leaf[i], linear.packed).dequantize()).T
    return np.asarray(linear.weight.get_value()[i], np.float32)


def torch_model(model: Decoder) -> Any:
    """transformers' model that computes what ``model`` does without its adapters, in float32."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**model_config(model.config, jnp.float32))
    found = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = {
        "model.embed_tokens.weight": model.embed_tokens.weight.get_value(),
        "model.norm.weight": model.norm.weight.get_value(),
    }
    if model.lm_head is not None:
        state["lm_head.weight"] = model.lm_head.weight.get_value()
    for names, linear in linears(model):
        for i, name in enumerate(names):
            state[f"{name}.weight"] = dense_matrix(linear, i)
            if linear.bias is not None:
                state[f"{name}.bias"] = linear.bias.get_value()[i]
    for segment, (start, count) in zip(model.segments, model.spec.runs(), strict=True):
        for i in range(count):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                state[f"model.layers.{start + i}.{norm}.weight"] = getattr(segment, norm).weight.get_value()[i]
    tensors = {name: torch.tensor(np.array(array, np.float32)) for name, array in state.items()}
    missing, unexpected = found.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return found.eval()


def peft_model(model: Decoder) -> Any:
    """:func:`torch_model` with PEFT's LoRA, holding the LoRA of ``model``."""
    import peft
    import torch

    pairs = {names[0]: pair for names, _, pair in adapted_linears(model) if isinstance(pair, LowRank)}
    first = next(iter(pairs.values()))
    targets = sorted({name.rsplit(".", 1)[1] for name in pairs})
    config = peft.LoraConfig(r=first.rank, lora_alpha=first.alpha, target_modules=targets, lora_dropout=0.0)
    found = peft.get_peft_model(torch_model(model), config)
    for name, (part, array) in lora_tensors(model).items():
        layer = found.get_submodule(f"base_model.model.{name.rpartition('.')[0]}")
        with torch.no_grad():
            getattr(layer, part)["default"].weight.copy_(torch.tensor(array))
    return found


def lora_tensors(model: Decoder) -> dict[str, tuple[str, np.ndarray]]:
    """The LoRA of a model as PEFT has it: ``<module>.lora_A`` -> ("lora_A", (rank, in)), and B (out, rank)."""
    return {
        f"{name}.{part}": (part, np.array(stack[i]).T.copy())
        for names, _, pair in adapted_linears(model)
        for i, name in enumerate(names)
        for part, stack in zip(pair.parts, (pair.a, pair.b), strict=True)
    }
