"""Block by block: a dense decoder in, the same decoder with GPTQ-quantised projections out."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from lotaqaf_jax.models import PROJECTIONS, Decoder, QuantSpec, dense_spec
from lotaqaf_jax.models.decoder import Block, attention_mask, causal
from lotaqaf_jax.models.rope import apply_rope, rope_angles
from lotaqaf_jax.quant import QuantizedWeight, pack
from lotaqaf_jax.quant.gptq import accumulate_hessian, factor_hessian, quantize_layer

__all__ = ["quantize_decoder"]

# The projections that read the same input; in the order in which a block computes them.
_STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def quantize_decoder(
    model: Decoder,
    batches: Sequence[dict[str, np.ndarray]],
    quant: QuantSpec,
    *,
    grid_search: bool = True,
    damp_percent: float = 0.05,
) -> Decoder:
    """Quantise every projection with GPTQ, one block after the other.

    The Hessian of a projection is that of the inputs it gets when everything before it is quantised already.
    Embedding, norms and biases become float16.

    Args:
        model: dense decoder, its layers in one run, with tied embeddings.
        batches: calibration data, ``input_ids``, ``positions`` and ``segment_ids``, each (batch, length).
        quant: width, group size and format; without act-order.
        grid_search: see :func:`lotaqaf_jax.quant.gptq.quantize_layer`.
        damp_percent: likewise.

    Returns:
        a new decoder with packed projections.
    """
    config = model.config
    graph, stacked = nnx.split(model.segments[0])
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.num_hidden_layers)]
    masks = [attention_mask(jnp.asarray(batch["segment_ids"])) for batch in batches]
    ropes = [rope_angles(jnp.asarray(batch["positions"]), config) for batch in batches]
    real = [batch["segment_ids"] != 0 for batch in batches]
    states = [model.embed_tokens(jnp.asarray(batch["input_ids"]), model.dtype) for batch in batches]
    packed: dict[str, list[QuantizedWeight]] = {path: [] for path in PROJECTIONS}
    for i, layer in enumerate(tqdm(layers, desc="quantising", unit="block")):
        block = nnx.merge(graph, layer)
        for stage in _STAGES:
            first = block.linear(stage[0])
            size = first.weight.get_value().shape[-1]
            hessian, count = jnp.zeros((size, size)), 0
            for x, rope, mask, keep in zip(states, ropes, masks, real, strict=True):
                hessian, count = accumulate_hessian(hessian, count, _inputs(block, stage[0], x, rope, mask), keep)
            factor = factor_hessian(hessian, desc_act=False, damp_percent=damp_percent, name=f"layer {i} {stage[0]}")
            for path in stage:
                linear = block.linear(path)
                result = quantize_layer(
                    linear.weight.get_value().T,
                    factor,
                    bits=quant.bits,
                    group_size=quant.group_size,
                    sym=False,
                    desc_act=False,
                    grid_search=grid_search,
                    name=f"layer {i} {path}",
                )
                linear.weight.set_value(result.dequantize().T)
                weight = QuantizedWeight(
                    qweight=pack(result.integers, quant.bits, axis=-2),
                    scales=result.scales,
                    zeros=result.zeros,
                    g_idx=None,
                    offset=None,
                    bits=quant.bits,
                    group_size=quant.group_size,
                    shape=tuple(result.integers.shape),
                    checkpoint_format=quant.checkpoint_format,
                )
                weight.validate(path)
                packed[path].append(weight)
        states = [block(x, rope, causal(mask))[0] for x, rope, mask in zip(states, ropes, masks, strict=True)]
    return _assemble(model, packed, quant)


def _inputs(block: Block, path: str, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array) -> jax.Array:
    """What the projection at ``path`` multiplies, for the block's input ``x``; (batch, length, in)."""
    normed = block.input_layernorm(x)
    if path == "self_attn.q_proj":
        return normed
    attention = block.self_attn
    batch, length, _ = x.shape
    q = attention.q_proj(normed).reshape(batch, length, attention.heads, attention.head_dim)
    k = attention.k_proj(normed).reshape(batch, length, attention.kv_heads, attention.head_dim)
    v = attention.v_proj(normed).reshape(batch, length, attention.kv_heads, attention.head_dim)
    mixed = jax.nn.dot_product_attention(apply_rope(q, *rope), apply_rope(k, *rope), v, mask=mask, is_causal=True)
    mixed = mixed.reshape(batch, length, -1)
    if path == "self_attn.o_proj":
        return mixed
    normed = block.post_attention_layernorm(x + attention.o_proj(mixed))
    if path == "mlp.gate_proj":
        return normed
    return jax.nn.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)


def _assemble(model: Decoder, packed: dict[str, list[QuantizedWeight]], quant: QuantSpec) -> Decoder:
    half = jnp.float16
    quantised = Decoder(model.config, dense_spec(model.config, half, quant), jnp.float32)
    quantised.embed_tokens.weight.set_value(model.embed_tokens.weight.get_value().astype(half))
    quantised.norm.weight.set_value(model.norm.weight.get_value().astype(half))
    old, new = model.segments[0], quantised.segments[0]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        getattr(new, norm).weight.set_value(getattr(old, norm).weight.get_value().astype(half))
    for path, weights in packed.items():
        new.linear(path).weight.set_value(jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights))
        if (bias := old.linear(path).bias) is not None:
            new.linear(path).bias.set_value(bias.get_value().astype(half))
    return quantised
