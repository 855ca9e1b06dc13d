"""The Flax NNX decoder for Llama and Qwen2, its loading, and its adapters."""

from lotaqaf_jax.models.adapters import (
    TARGET_MODULES,
    AdapterStatistics,
    MoveCounts,
    adapted_linears,
    adapter_statistics,
    add_adapters,
    count_moves,
    linears,
    merge,
    moved_shares,
    with_omegas,
)
from lotaqaf_jax.models.config import DecoderConfig
from lotaqaf_jax.models.decoder import Decoder, Recompute
from lotaqaf_jax.models.layers import Adapter, Linear, PackedWeight
from lotaqaf_jax.models.low_rank import add_lora, add_qalora, round_lora
from lotaqaf_jax.models.presets import PRESETS, preset
from lotaqaf_jax.models.pretrained import init_decoder, load_pretrained
from lotaqaf_jax.models.registry import KNOWN_MODELS, local_folder
from lotaqaf_jax.models.spec import PROJECTIONS, DecoderSpec, LinearSpec, QuantSpec, dense_spec

__all__ = [
    "KNOWN_MODELS",
    "PRESETS",
    "PROJECTIONS",
    "TARGET_MODULES",
    "Adapter",
    "AdapterStatistics",
    "Decoder",
    "DecoderConfig",
    "DecoderSpec",
    "Linear",
    "LinearSpec",
    "MoveCounts",
    "PackedWeight",
    "QuantSpec",
    "Recompute",
    "adapted_linears",
    "adapter_statistics",
    "add_adapters",
    "add_lora",
    "add_qalora",
    "count_moves",
    "dense_spec",
    "init_decoder",
    "linears",
    "load_pretrained",
    "local_folder",
    "merge",
    "moved_shares",
    "preset",
    "round_lora",
    "with_omegas",
]
