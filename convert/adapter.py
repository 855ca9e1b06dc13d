"""Adapters on disk: ``adapter_model.safetensors`` and ``adapter_config.json``.

Those of LoRA are a folder of PEFT's (:mod:`convert.peft_adapter`). Those that change quantised weights have a format of
our own. Its tensors go by the name of their module:

    LoTA-QAF   model.layers.0.self_attn.q_proj.lota_A     (in, rank) and .lota_B (rank, out), int8
    QA-LoRA    model.layers.0.self_attn.q_proj.qalora_A   (groups, rank) and .qalora_B (rank, out), float32

The config says by which rule they are applied (omega as a number or, where matrices differ, by the names of their
modules), and names the base by its fingerprint: T depends on the integers of the base through the boundary rule, and mu
on its groups and scales, so on other weights the adapter means nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.fingerprint import fingerprint
from convert.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_lora, read_tensor, save_lora
from convert.writing import new_folder, write_json, write_safetensors
from lotaqaf_jax import __version__
from lotaqaf_jax.errors import AdapterError, CheckpointError, ConfigError
from lotaqaf_jax.kernels import AnyAdapter, GroupLowRank, LowRank, TernaryAdapter, WeightAdapter
from lotaqaf_jax.lora import check_settings as check_low_rank
from lotaqaf_jax.models import TARGET_MODULES, Decoder, adapted_linears, linears
from lotaqaf_jax.parallel.processes import fetch
from lotaqaf_jax.qalora import check_pool
from lotaqaf_jax.quant import QuantizedWeight
from lotaqaf_jax.quant.folder import CheckpointFolder, read_header, read_json
from lotaqaf_jax.ternary import check_settings

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "load_adapter", "save_adapter", "training_lines"]

_FORMAT_VERSION = 1
_OFFSET_TYPES = ("float32", "float16", "bfloat16")
_NUMBER = (int, float)


@dataclasses.dataclass(frozen=True)
class _Format:
    """How adapters of one kind are written.

    ``settings`` are the fields of the config that rule over how they are applied, with their types; ``build`` makes an
    adapter of A, B, these, and the names of the modules in the stack, ``rows`` says how many rows A has, and ``check``
    refuses values out of range.
    """

    kind: type[WeightAdapter]
    dtype: Any
    settings: Mapping[str, Any]
    build: Callable[[Any, Any, dict[str, Any], list[str]], WeightAdapter]
    rows: Callable[[QuantizedWeight], int]
    check: Callable[[dict[str, Any]], None]

    def rule(self, adapter: AnyAdapter) -> dict[str, Any]:
        """The settings of an adapter."""
        found = {name: getattr(adapter, name) for name in self.settings if name != "omega"}
        return found | {"offset_dtype": jnp.dtype(found["offset_dtype"]).name}


def _omegas(adapters: Mapping[str, tuple[AnyAdapter, int]]) -> dict[str, Any]:
    """The setting omega of ternary adapters: one number, or one for every module."""
    found = {
        name: float(fetch(adapter.omega)[i])
        for name, (adapter, i) in adapters.items()
        if isinstance(adapter, TernaryAdapter)
    }
    values = set(found.values())
    return {"omega": values.pop() if len(values) == 1 else found} if found else {}


def _omega_of(config: dict[str, Any], name: str) -> float:
    """omega of a module.

    Raises:
        AdapterError: the config has none for it.
    """
    omega = config["omega"]
    if isinstance(omega, dict):
        omega = omega.get(name)
    if not isinstance(omega, _NUMBER) or isinstance(omega, bool):
        raise AdapterError(
            f"{ADAPTER_CONFIG}: omega of {name} is {omega!r}, expected a number. Save the adapter again."
        )
    return float(omega)


def _build_lota(a: Any, b: Any, config: dict[str, Any], names: list[str]) -> TernaryAdapter:
    omegas = jnp.asarray([_omega_of(config, name) for name in names], jnp.float32)
    return TernaryAdapter(a, b, omegas, config["offset"], jnp.dtype(config["offset_dtype"]))


def _check_lota(config: dict[str, Any]) -> None:
    omegas = config["omega"].values() if isinstance(config["omega"], dict) else [config["omega"]]
    for omega in omegas:
        if not isinstance(omega, _NUMBER) or isinstance(omega, bool):
            raise ConfigError(f"omega: found {omega!r}, expected a number.")
        check_settings(config["rank"], omega, config["offset"])


def _check_qalora(config: dict[str, Any]) -> None:
    check_low_rank(config["rank"], config["alpha"])
    check_pool(config["pool"])


_FORMATS = {
    "lota-qaf": _Format(
        kind=TernaryAdapter,
        dtype=np.int8,
        settings={"rank": int, "omega": (*_NUMBER, dict), "offset": str, "offset_dtype": str},
        build=_build_lota,
        rows=lambda weight: weight.shape[0],
        check=_check_lota,
    ),
    "qa-lora": _Format(
        kind=GroupLowRank,
        dtype=np.float32,
        settings={"rank": int, "alpha": _NUMBER, "pool": str, "offset_dtype": str},
        build=lambda a, b, c, names: GroupLowRank(a, b, float(c["alpha"]), c["pool"], jnp.dtype(c["offset_dtype"])),
        rows=lambda weight: weight.groups,
        check=_check_qalora,
    ),
}


def training_lines(directory: str | Path) -> list[str]:
    """How an adapter was trained, for a card: the lines it was saved with, else what its config says; [] for a LoRA."""
    config = read_json(Path(directory) / ADAPTER_CONFIG)
    found = config.get("training")
    if isinstance(found, list):
        return [str(line) for line in found]
    names = ("method", "rank", "offset", "base_model_name_or_path")
    return [f"{name} {config[name]}" for name in names if name in config] if "method" in config else []


def save_adapter(
    model: Decoder,
    directory: str | Path,
    *,
    base: CheckpointFolder,
    training: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the adapters of a model.

    Args:
        model: a decoder with adapters.
        directory: the folder to write.
        base: the checkpoint that the model was loaded from.
        training: lines on how it was trained, for the cards of what is exported with it; a LoRA's config has no place
            for them.
        overwrite: replace an adapter that is there.
        progress: show progress bars when it takes longer than a second.

    Raises:
        AdapterError: the model has no adapters, adapters of several settings, ternary ones of other values than -1, 0,
            1, or values that are NaN or infinite.
        ConfigError: the folder is not empty.
        OutputError: the folder cannot be written.
    """
    adapters = {name: (adapter, i) for names, _, adapter in adapted_linears(model) for i, name in enumerate(names)}
    if not adapters:
        raise AdapterError("the model has no adapters to save; they are gone after a merge. Save them before it.")
    kinds = {type(adapter) for adapter, _ in adapters.values()}
    if kinds == {LowRank}:
        save_lora(model, directory, base=base, overwrite=overwrite)
        return
    if len(kinds) > 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise AdapterError(f"the adapters are of several kinds ({', '.join(names)}), a saved adapter is of one.")
    method, form = next((name, form) for name, form in _FORMATS.items() if form.kind in kinds)
    rules = {tuple(form.rule(adapter).items()) for adapter, _ in adapters.values()}
    if len(rules) > 1:
        raise AdapterError(f"the adapters have several settings {sorted(rules)}, a saved adapter has one.")
    config = {
        "method": method,
        "format_version": _FORMAT_VERSION,
        **dict(rules.pop()),
        **_omegas(adapters),
        "target_modules": [name for name in TARGET_MODULES if any(key.endswith(f".{name}") for key in adapters)],
        "base_fingerprint": fingerprint(base, progress=progress),
        "base_model_name_or_path": str(base.path),
        "lotaqaf_jax_version": __version__,
    }
    if training:
        config["training"] = list(training)
    tensors: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for name, (adapter, _) in adapters.items():
        for part, stack in zip(adapter.parts, (adapter.a, adapter.b), strict=True):
            tensors[f"{name}.{part}"] = (form.dtype, tuple(stack.shape[1:]))

    def read(key: str) -> np.ndarray:
        module, _, part = key.rpartition(".")
        adapter, i = adapters[module]
        return _checked(fetch((adapter.a if part == adapter.parts[0] else adapter.b)[i]), key, form)

    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in tensors.values())
    with new_folder(directory, overwrite=overwrite, needed=size, sources=[base.path]) as folder:
        write_safetensors(folder / ADAPTER_WEIGHTS, tensors, read, {"format": method})
        write_json(folder / ADAPTER_CONFIG, config)


def _checked(array: np.ndarray, name: str, form: _Format) -> np.ndarray:
    """The array in the type of the file.

    Raises:
        AdapterError: it holds values that it cannot have.
    """
    ternary = form.dtype == np.int8
    bad = ~(np.isin(array, (-1, 0, 1)) if ternary else np.isfinite(array))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        wanted, why = (
            ("-1, 0 or 1", "was not trained with ternary steps") if ternary else ("finite", "its run diverged")
        )
        raise AdapterError(
            f"{name}: {np.count_nonzero(bad)} of {bad.size} values are not {wanted}, the first {array[place]} at "
            f"{place}. The adapter is damaged, or {why}."
        )
    return array.astype(form.dtype)


def load_adapter(model: Decoder, directory: str | Path, *, base: CheckpointFolder, progress: bool = True) -> Decoder:
    """Put saved adapters on a model; the inverse of :func:`save_adapter`, and the way in for a LoRA that PEFT wrote.

    Args:
        model: the base model, without adapters.
        directory: the adapter's folder.
        base: the checkpoint that ``model`` was loaded from.
        progress: show a progress bar when hashing the base takes longer than a second.

    Returns:
        A new model over the same weights, with adapters.

    Raises:
        AdapterError: the adapter is missing, damaged, of another method or version, was trained on another base, or is
            a LoRA with something that this model does not compute.
    """
    folder = Path(directory)
    try:
        config = read_json(folder / ADAPTER_CONFIG)
    except CheckpointError as problem:
        raise AdapterError(f"{problem} Pass the folder of an adapter.") from None
    if "method" not in config and config.get("peft_type") == "LORA":
        return load_lora(model, folder, config, where=base.path)
    config = _read_config(folder, config)
    form = _FORMATS[config["method"]]
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
        keys = {name: [f"{name}.{part}" for part in form.kind.parts] for name in names}
        held = [name for name in names if any(key in entries for key in keys[name])]
        if not held:
            continue
        if not linear.is_quantized:
            raise AdapterError(f"{folder}: {held[0]} has adapters, but is held in 16 bit in {base.path}.")
        shapes = (form.rows(linear.packed), config["rank"]), (config["rank"], linear.packed.shape[1])
        stacks = []
        for part, shape in enumerate(shapes):
            tensors = [
                read_tensor(folder / ADAPTER_WEIGHTS, entries, keys[name][part], shape, (form.dtype,)) for name in names
            ]
            checked = [_checked(tensor, keys[name][part], form) for name, tensor in zip(names, tensors, strict=True)]
            stacks.append(jnp.asarray(np.stack(checked)))
        adapters = form.build(stacks[0], stacks[1], config, names)
        if linear.sharding is not None:
            adapters = jax.device_put(adapters, linear.adapter_shardings(adapters))
        linear.set_adapters(adapters)
        left.difference_update(*keys.values())
    if left:
        raise AdapterError(
            f"{folder / ADAPTER_WEIGHTS}: {len(left)} tensors have no place in {base.path}, the first {min(left)}. "
            "Pass the base that the adapter was trained on."
        )
    if not any(True for _ in adapted_linears(model)):
        raise AdapterError(f"{folder / ADAPTER_WEIGHTS}: holds no adapters. Save the adapter again.")
    return model


def _read_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config, checked."""
    where = folder / ADAPTER_CONFIG
    method = config.get("method")
    if method not in _FORMATS:
        raise AdapterError(
            f"{where}: the adapter's method is {method or config.get('peft_type')!r}, expected one of "
            f"{', '.join(_FORMATS)}, or a LoRA of PEFT's. Pass such an adapter."
        )
    if config.get("format_version") != _FORMAT_VERSION:
        raise AdapterError(
            f"{where}: format_version is {config.get('format_version')!r}, expected {_FORMAT_VERSION}. Use the release "
            f"that wrote it ({config.get('lotaqaf_jax_version', 'not named')})."
        )
    for key, kind in {**_FORMATS[method].settings, "base_fingerprint": str}.items():
        if not isinstance(config.get(key), kind) or isinstance(config[key], bool):
            raise AdapterError(f"{where}: {key} is {config.get(key)!r}. The file is damaged; save the adapter again.")
    if config["offset_dtype"] not in _OFFSET_TYPES:
        raise AdapterError(f"{where}: offset_dtype is {config['offset_dtype']!r}, expected one of {_OFFSET_TYPES}.")
    try:
        _FORMATS[method].check(config)
    except ConfigError as problem:
        raise AdapterError(f"{where}: {problem}") from None
    return config
