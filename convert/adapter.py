"""Ternary adapters on disk: ``adapter_model.safetensors`` and ``adapter_config.json``.

The tensors are int8, by the name of their module: ``model.layers.0.self_attn.q_proj.lota_A`` (in, rank) and ``.lota_B``
(rank, out). The config says by which rule they are applied, and names the base by its fingerprint: T depends on the
integers of the base through the boundary rule, and mu on its groups, so on other weights the adapter means nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.fingerprint import fingerprint
from convert.writing import new_folder, write_json, write_safetensors
from lotaqaf_jax import __version__
from lotaqaf_jax.errors import AdapterError, CheckpointError, ConfigError
from lotaqaf_jax.kernels import TernaryAdapter
from lotaqaf_jax.models import TARGET_MODULES, Adapter, Decoder, adapted_linears, linears
from lotaqaf_jax.quant.folder import CheckpointFolder, TensorEntry, read_header, read_json
from lotaqaf_jax.ternary import check_settings

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "load_adapter", "save_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_METHOD = "lota-qaf"
_FORMAT_VERSION = 1
_OFFSET_TYPES = ("float32", "float16", "bfloat16")


def save_adapter(
    model: Decoder, directory: str | Path, *, base: CheckpointFolder, overwrite: bool = False, progress: bool = True
) -> None:
    """Write the adapters of a model.

    Args:
        model: a decoder with adapters.
        directory: the folder to write.
        base: the checkpoint that the model was loaded from.
        overwrite: replace an adapter that is there.
        progress: show progress bars when it takes longer than a second.

    Raises:
        AdapterError: the model has no adapters, values other than -1, 0, 1, or adapters of several settings.
        ConfigError: the folder is not empty.
        OutputError: the folder cannot be written.
    """
    adapters = {name: (adapter, i) for names, _, adapter in adapted_linears(model) for i, name in enumerate(names)}
    if not adapters:
        raise AdapterError("the model has no adapters to save; they are gone after a merge. Save them before it.")
    rules = {(a.rank, a.omega, a.offset, jnp.dtype(a.offset_dtype).name) for a, _ in adapters.values()}
    if len(rules) > 1:
        raise AdapterError(f"the adapters have several settings {sorted(rules)}, a saved adapter has one.")
    rank, omega, offset, offset_dtype = rules.pop()
    config = {
        "method": _METHOD,
        "format_version": _FORMAT_VERSION,
        "rank": rank,
        "omega": omega,
        "offset": offset,
        "offset_dtype": offset_dtype,
        "target_modules": [name for name in TARGET_MODULES if any(key.endswith(f".{name}") for key in adapters)],
        "base_fingerprint": fingerprint(base, progress=progress),
        "base_model_name_or_path": str(base.path),
        "lotaqaf_jax_version": __version__,
    }
    tensors: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for name, (adapter, _) in adapters.items():
        tensors[f"{name}.lota_A"] = (np.int8, tuple(adapter.a.shape[1:]))
        tensors[f"{name}.lota_B"] = (np.int8, tuple(adapter.b.shape[1:]))

    def read(key: str) -> np.ndarray:
        module, _, part = key.rpartition(".")
        adapter, i = adapters[module]
        return _ternary(np.asarray((adapter.a if part == "lota_A" else adapter.b)[i]), key)

    size = sum(int(np.prod(shape)) for _, shape in tensors.values())
    with new_folder(directory, overwrite=overwrite, needed=size, sources=[base.path]) as folder:
        write_safetensors(folder / ADAPTER_WEIGHTS, tensors, read, {"format": "lota-qaf"})
        write_json(folder / ADAPTER_CONFIG, config)


def _ternary(array: np.ndarray, name: str) -> np.ndarray:
    """The array as int8.

    Raises:
        AdapterError: it holds other values than -1, 0 and 1.
    """
    bad = ~np.isin(array, (-1, 0, 1))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AdapterError(
            f"{name}: {np.count_nonzero(bad)} of {bad.size} values are not -1, 0 or 1, the first {array[place]} at "
            f"{place}. The adapter is damaged, or was not trained with ternary steps."
        )
    return array.astype(np.int8)


def load_adapter(model: Decoder, directory: str | Path, *, base: CheckpointFolder, progress: bool = True) -> Decoder:
    """Put saved adapters on a model; the inverse of :func:`save_adapter`.

    Args:
        model: the base model, without adapters.
        directory: the adapter's folder.
        base: the checkpoint that ``model`` was loaded from.
        progress: show a progress bar when hashing the base takes longer than a second.

    Returns:
        A new model over the same weights, with adapters.

    Raises:
        AdapterError: the adapter is missing, damaged, of another method or version, or was trained on another base.
    """
    folder = Path(directory)
    config = _read_config(folder)
    found = fingerprint(base, progress=progress)
    if found != config["base_fingerprint"]:
        raise AdapterError(
            f"{folder}: the adapter was trained on another base ({config.get('base_model_name_or_path', 'unnamed')}, "
            f"fingerprint {config['base_fingerprint'][:24]}...) than {base.path} ({found[:24]}...). Pass the base that "
            "it was trained on; a merged or requantised model is another base."
        )
    try:
        entries = read_header(folder / ADAPTER_WEIGHTS)
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from None
    model = nnx.merge(*nnx.split(model), copy=True)
    left = set(entries)
    for names, linear in linears(model):
        held = [name for name in names if f"{name}.lota_A" in entries or f"{name}.lota_B" in entries]
        if not held:
            continue
        if not linear.is_quantized:
            raise AdapterError(f"{folder}: {held[0]} has adapters, but is held in 16 bit in {base.path}.")
        n_in, n_out = linear.packed.shape
        rank = config["rank"]
        a = jnp.asarray(np.stack([_read(folder, entries, f"{name}.lota_A", (n_in, rank)) for name in names]))
        b = jnp.asarray(np.stack([_read(folder, entries, f"{name}.lota_B", (rank, n_out)) for name in names]))
        rule = (config["omega"], config["offset"], jnp.dtype(config["offset_dtype"]))
        linear.adapter = Adapter(TernaryAdapter(a, b, *rule))
        left -= {f"{name}.lota_{part}" for name in names for part in "AB"}
    if left:
        raise AdapterError(
            f"{folder / ADAPTER_WEIGHTS}: {len(left)} tensors have no place in {base.path}, the first {min(left)}. "
            "Pass the base that the adapter was trained on."
        )
    if not any(True for _ in adapted_linears(model)):
        raise AdapterError(f"{folder / ADAPTER_WEIGHTS}: holds no adapters. Save the adapter again.")
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / ADAPTER_CONFIG)
    except CheckpointError as problem:
        raise AdapterError(f"{problem} Pass the folder of a LoTA-QAF adapter.") from None
    where = folder / ADAPTER_CONFIG
    if config.get("method") != _METHOD:
        kind = config.get("method") or config.get("peft_type")
        raise AdapterError(f"{where}: the adapter's method is {kind!r}, expected {_METHOD!r}. Pass a LoTA-QAF adapter.")
    if config.get("format_version") != _FORMAT_VERSION:
        raise AdapterError(
            f"{where}: format_version is {config.get('format_version')!r}, expected {_FORMAT_VERSION}. Use the release "
            f"that wrote it ({config.get('lotaqaf_jax_version', 'not named')})."
        )
    wanted: dict[str, Any] = {
        "rank": int,
        "omega": (int, float),
        "offset": str,
        "offset_dtype": str,
        "base_fingerprint": str,
    }
    for key, kind in wanted.items():
        if not isinstance(config.get(key), kind) or isinstance(config[key], bool):
            raise AdapterError(f"{where}: {key} is {config.get(key)!r}. The file is damaged; save the adapter again.")
    if config["offset_dtype"] not in _OFFSET_TYPES:
        raise AdapterError(f"{where}: offset_dtype is {config['offset_dtype']!r}, expected one of {_OFFSET_TYPES}.")
    try:
        check_settings(config["rank"], config["omega"], config["offset"])
    except ConfigError as problem:
        raise AdapterError(f"{where}: {problem}") from None
    return config | {"omega": float(config["omega"])}


def _read(folder: Path, entries: dict[str, TensorEntry], name: str, shape: tuple[int, ...]) -> np.ndarray:
    entry = entries.get(name)
    where = folder / ADAPTER_WEIGHTS
    if entry is None:
        raise AdapterError(f"{where}: tensor {name} is missing. Save the adapter again.")
    if entry.dtype != np.int8 or entry.shape != shape:
        raise AdapterError(
            f"{where}: tensor {name} is {entry.dtype} {entry.shape}, expected int8 {shape}. Check that the adapter "
            "belongs to this base, and rank in its config."
        )
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return _ternary(np.frombuffer(file.read(entry.nbytes), np.int8).reshape(shape), name)
