"""LoRA adapters as PEFT has them on disk: written for others to load, and read back, whoever wrote them.

    base_model.model.<module>.lora_A.weight   (rank, in) float32, A transposed
    base_model.model.<module>.lora_B.weight   (out, rank) float32, B transposed

``adapter_config.json`` has rank and alpha; y = W x + alpha / rank * B A x. A LoRA does not know its base: it stands
beside a weight of the same shape, quantised or not, and whether it means something there is for whoever combines them.

Source: format of PEFT's LoRA folders, with peft 0.21.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.writing import new_folder, write_json, write_safetensors
from lotaqaf_jax.errors import AdapterError, CheckpointError, ConfigError
from lotaqaf_jax.kernels import LowRank
from lotaqaf_jax.lora import check_settings
from lotaqaf_jax.models import Adapter, Decoder, adapted_linears, linears
from lotaqaf_jax.parallel.processes import fetch
from lotaqaf_jax.quant.folder import CheckpointFolder, TensorEntry, read_header

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "PREFIX",
    "load_lora",
    "lora_config",
    "read_tensor",
    "save_lora",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FLOATS = (np.float32, np.float16, jnp.bfloat16)
# What PEFT can put into a LoRA that changes what it computes, with the value under which it does not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "modules_to_save": ([],),
    "alora_invocation_tokens": (),
    "layer_replication": (),
    "target_parameters": ([],),
    "trainable_token_indices": (),
}


def lora_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], others: Iterable[str], model_name: str
) -> dict[str, Any]:
    """The config of a LoRA.

    Args:
        ranks: rank of every adapted module, by its full name.
        alphas: alpha of every one of them.
        others: full names of the linear layers that are not adapted.
        model_name: what it names as its base.
    """
    left = {name.rsplit(".", 1)[-1] for name in others}
    by_kind: dict[str, set[tuple[int, float]]] = collections.defaultdict(set)
    for name, rank in ranks.items():
        by_kind[name.rsplit(".", 1)[-1]].add((rank, alphas[name]))
    # Short names where they say it all; full ones where a kind has modules without adapters or of several ranks.
    short = all(kind not in left and len(found) == 1 for kind, found in by_kind.items())
    # The largest, since some servers compare the default with the largest rank they serve.
    default = max((rank, alphas[name]) for name, rank in ranks.items())
    if short:
        targets = list(by_kind)
        patterns = {rf"(?:.*\.)?{kind}": min(found) for kind, found in by_kind.items()}
    else:
        targets = list(ranks)
        patterns = {re.escape(name): (rank, alphas[name]) for name, rank in ranks.items()}
    patterns = {pattern: pair for pattern, pair in patterns.items() if pair != default}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_name,
        "inference_mode": True,
        "r": default[0],
        "lora_alpha": default[1],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": targets,
        "rank_pattern": {pattern: rank for pattern, (rank, _) in patterns.items()},
        "alpha_pattern": {pattern: alpha for pattern, (_, alpha) in patterns.items()},
    }


def _whole(alpha: float) -> float:
    """An int where it is one, as people write it."""
    return int(alpha) if alpha == int(alpha) else alpha


def save_lora(model: Decoder, directory: str | Path, *, base: CheckpointFolder, overwrite: bool = False) -> None:
    """Write the LoRA adapters of a model as a folder that PEFT loads onto ``base``.

    Args:
        model: a decoder with LoRA adapters.
        directory: the folder to write.
        base: the checkpoint that the model was loaded from.
        overwrite: replace an adapter that is there.

    Raises:
        AdapterError: a value is NaN or infinite.
        ConfigError: the folder is not empty.
        OutputError: the folder cannot be written.
    """
    adapters: dict[str, tuple[LowRank, int]] = {}
    others = []
    for names, linear in linears(model):
        pair = linear.adapters
        if isinstance(pair, LowRank):
            adapters |= {name: (pair, i) for i, name in enumerate(names)}
        else:
            others += names
    tensors: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for name, (pair, _) in adapters.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = (np.float32, pair.a.shape[:0:-1])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (np.float32, pair.b.shape[:0:-1])

    def read(key: str) -> np.ndarray:
        module, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        pair, i = adapters[module]
        array = fetch((pair.a if part == "lora_A" else pair.b)[i]).T.astype(np.float32)
        _check_finite(array, key)
        return array

    config = lora_config(
        {name: pair.rank for name, (pair, _) in adapters.items()},
        {name: _whole(pair.alpha) for name, (pair, _) in adapters.items()},
        others,
        str(base.path),
    )
    size = 4 * sum(math.prod(shape) for _, shape in tensors.values())
    with new_folder(directory, overwrite=overwrite, needed=size, sources=[base.path]) as folder:
        write_safetensors(folder / ADAPTER_WEIGHTS, tensors, read, {"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, config)


def load_lora(model: Decoder, folder: Path, config: dict[str, Any], *, where: Path) -> Decoder:
    """Put the LoRA in ``folder`` on a model, quantised or not.

    A layer of the model that the LoRA leaves out, while it has the same projection of others, gets zeros.

    Args:
        model: the base model, without adapters.
        folder: a folder that PEFT, or :func:`save_lora`, wrote.
        config: its ``adapter_config.json``.
        where: the model's folder, for messages.

    Returns:
        A new model over the same weights, with float32 adapters.

    Raises:
        AdapterError: a tensor is missing, damaged or of another shape, or the LoRA has something that is not computed
            here: DoRA, biases, modules saved whole, layers of one projection with several ranks or factors, and more.
    """
    for key, plain in _PLAIN.items():
        if config.get(key) is not None and config[key] not in plain:
            raise AdapterError(
                f"{folder / ADAPTER_CONFIG}: {key} is {config[key]!r}, which is not computed here. Use a LoRA without."
            )
    path = folder / ADAPTER_WEIGHTS
    try:
        entries = read_header(path)
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from None
    model = nnx.merge(*nnx.split(model), copy=True)
    left = set(entries)
    for names, linear in linears(model):
        keys = {name: [f"{PREFIX}{name}.lora_{part}.weight" for part in "AB"] for name in names}
        held = [name for name in names if any(key in entries for key in keys[name])]
        if not held:
            continue
        if linear.adapters is not None:
            raise AdapterError(f"{names[0]} has adapters already; start again from the checkpoint.")
        rules = {name: _rule(config, name, folder) for name in held}
        if len(set(rules.values())) > 1:
            one, other = held[0], next(name for name in held if rules[name] != rules[held[0]])
            raise AdapterError(
                f"{folder / ADAPTER_CONFIG}: rank and alpha are {rules[one]} for {one} and {rules[other]} for {other}; "
                "layers that are computed together need the same. Use a LoRA with one rank for a projection."
            )
        rank, alpha = rules[held[0]]
        n_in, n_out = linear.shape
        a, b = np.zeros((len(names), n_in, rank), np.float32), np.zeros((len(names), rank, n_out), np.float32)
        for i, name in enumerate(names):
            if name in held:
                a[i] = read_tensor(path, entries, keys[name][0], (rank, n_in), _FLOATS).T
                b[i] = read_tensor(path, entries, keys[name][1], (n_out, rank), _FLOATS).T
                _check_finite(a[i], keys[name][0])
                _check_finite(b[i], keys[name][1])
        linear.adapter = Adapter(LowRank(jnp.asarray(a), jnp.asarray(b), alpha))
        left.difference_update(*keys.values())
    if left:
        raise AdapterError(
            f"{path}: {len(left)} tensors have no place in {where}, the first {min(left)}. Pass the model that the "
            "adapter was trained on."
        )
    if not any(True for _ in adapted_linears(model)):
        raise AdapterError(f"{path}: holds no adapters. Save the adapter again.")
    return model


def _rule(config: dict[str, Any], name: str, folder: Path) -> tuple[int, float]:
    """Rank and alpha of a module, alpha such that the product is multiplied by alpha / rank."""

    def of(pattern_key: str, key: str) -> Any:
        for pattern, value in (config.get(pattern_key) or {}).items():
            # PEFT looks for the pattern at the end of the name, behind a dot or at its start.
            if re.match(rf"(?:.*\.)?(?:{pattern})$", name):
                return value
        return config.get(key)

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    for key, value, kind in (("r", rank, int), ("lora_alpha", alpha, (int, float))):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise AdapterError(
                f"{folder / ADAPTER_CONFIG}: {key} of {name} is {value!r}. The file is damaged; save the adapter again."
            )
    try:
        check_settings(rank, alpha)
    except ConfigError as problem:
        raise AdapterError(f"{folder / ADAPTER_CONFIG}: {problem}") from None
    return rank, float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def read_tensor(
    path: Path, entries: Mapping[str, TensorEntry], name: str, shape: tuple[int, ...], kinds: tuple[Any, ...]
) -> np.ndarray:
    """A tensor of an adapter's file.

    Raises:
        AdapterError: it is missing, or of another type or shape.
    """
    entry = entries.get(name)
    if entry is None:
        raise AdapterError(f"{path}: tensor {name} is missing. Save the adapter again.")
    if entry.dtype not in kinds or entry.shape != shape:
        wanted = " or ".join(np.dtype(kind).name for kind in kinds)
        raise AdapterError(
            f"{path}: tensor {name} is {entry.dtype} {entry.shape}, expected {wanted} {shape}. Check that the adapter "
            "belongs to this base, and rank in its config."
        )
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return np.frombuffer(file.read(entry.nbytes), entry.dtype).reshape(shape)


def _check_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array).all():
        raise AdapterError(f"{name}: holds values that are NaN or infinite. The adapter is damaged, or diverged.")
