"""compressed-tensors, format ``pack-quantized``, weights alone in integers (W4A16, W8A16).

    weight_packed      (out, ceil(in*bits/32))        int32   GPTQ's words, transposed
    weight_scale       (out, in/g)                    float   (out, 1) with strategy channel
    weight_zero_point  (ceil(out*bits/32), in/g)      int32   GPTQ's words of zero points, transposed; not if symmetric
    weight_g_idx       (in,)                          int32   of older writers, with act-order
    weight_shape       (2,)                                   (out, in)
    W[i, j] = scale[j, g(i)] * (q[i, j] - zero[j, g(i)])

Integers and zero points are signed numbers there, stored with 2^(bits-1) added to both; a symmetric zero point, 0, is
2^(bits-1) here. So the words need no change but to be transposed, which takes no copy.

Source: compressed-tensors 0.20, as llm-compressor writes it. Older writers packed 3 bit otherwise; their shapes differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant.config import ModuleQuantization, QuantizationConfig
from lotaqaf_jax.quant.files import TensorEntry
from lotaqaf_jax.quant.formats.stream import pack_rows
from lotaqaf_jax.quant.formats.view import FLOATS, Converted, Stored, View, Words, described

__all__ = ["read_config", "symmetric_zeros", "to_gptq", "view", "words"]

_FORMAT = "pack-quantized"
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")


def to_gptq(packed: np.ndarray) -> np.ndarray:
    """GPTQ's ``qweight`` or ``qzeros`` from ``weight_packed`` or ``weight_zero_point``: the transpose, a view."""
    return packed.T


def words(qweight: np.ndarray) -> np.ndarray:
    """``weight_packed`` (out, ceil(in*bits/32)) from GPTQ's ``qweight``; the inverse of :func:`to_gptq`."""
    return np.ascontiguousarray(qweight.T)


def symmetric_zeros(groups: int, out_features: int, bits: int) -> np.ndarray:
    """GPTQ's ``qzeros`` (groups, ceil(out*bits/32)), format gptq_v2, where every zero point is 2^(bits-1)."""
    row = pack_rows(np.full((1, out_features), 2 ** (bits - 1), np.uint8), bits)
    return np.broadcast_to(row, (groups, row.shape[1]))


def _groups(config: Mapping[str, Any], where: str) -> Iterator[tuple[list[str], ModuleQuantization]]:
    """The targets of every scheme, and what it says of weights.

    Raises:
        ConfigError: a scheme that is not one of weights in integers with a scale for each group or channel.
    """
    schemes = config.get("config_groups")
    if not isinstance(schemes, Mapping) or not schemes:
        raise ConfigError(f"{where}: config_groups is missing or empty. Restore the config file.")
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise ConfigError(f"{where}: {key} is set, which changes what the model computes and is not supported.")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ConfigError(f"{where}: sparsity_config has format {sparsity!r}, expected none, or 'dense'.")
    for name, scheme in schemes.items():
        place = f"{where}: config_groups[{name!r}]"
        if not isinstance(scheme, Mapping) or not isinstance(scheme.get("weights"), Mapping):
            raise ConfigError(f"{place}: found no scheme of weights. Spell the scheme out, with its weights.")
        stored = scheme.get("format") or config.get("format")
        if stored != _FORMAT:
            raise ConfigError(
                f"{place}: format is {stored!r}, expected {_FORMAT!r}. Of compressed-tensors, only weights in packed "
                "integers (W4A16, W8A16) can be read."
            )
        for key in ("input_activations", "output_activations"):
            if scheme.get(key):
                raise ConfigError(f"{place}: {key} are quantised too, which is not supported; expected weights alone.")
        weights = scheme["weights"]
        strategy, kind = weights.get("strategy"), weights.get("type", "int")
        if kind != "int" or strategy not in ("group", "channel"):
            raise ConfigError(
                f"{place}: weights of type {kind!r} and strategy {strategy!r}, expected 'int' and 'group' or 'channel'."
            )
        size = weights.get("group_size") if strategy == "group" else -1
        known = {"bits": weights.get("num_bits"), "group_size": size, "sym": weights.get("symmetric", True)}
        yield list(scheme.get("targets") or []), QuantizationConfig.from_hf(known, f"{place}: weights").default


def read_config(config: Mapping[str, Any], where: str) -> QuantizationConfig:
    """How most modules are quantised: what the first of ``config_groups`` says.

    Raises:
        ConfigError: another format, or a scheme that is not one of weights in integers.
    """
    return described(next(_groups(config, where))[1], {})


def _scheme(schemes: list[tuple[list[str], ModuleQuantization]], name: str, where: str) -> ModuleQuantization:
    """Of a module: a target that names it goes before one that matches it, and that before the class."""

    def by_pattern(target: str) -> bool:
        return target.startswith("re:") and re.match(target[3:], name) is not None

    for fits in (name.__eq__, by_pattern, "Linear".__eq__):
        for targets, how in schemes:
            if any(fits(target) for target in targets):
                return how
    raise ConfigError(
        f"{where}: no target of config_groups matches {name}, whose weight is packed. Restore the config file."
    )


def view(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], where: str) -> View:
    """A compressed-tensors folder as a GPTQ one.

    Args:
        config: its ``quantization_config``.
        entries: the tensors of its files.
        where: what to call the config in errors.

    Raises:
        ConfigError: as :func:`read_config`.
        CheckpointError: a tensor of a quantised module is missing or of another type.
    """
    stored, int32 = Stored(entries), np.dtype(np.int32)
    schemes = list(_groups(config, where))
    names = stored.modules("weight_packed")
    tensors = stored.others(f"{name}.{part}" for name in names for part in _PARTS)
    modules = {name: _scheme(schemes, name, where) for name in names}
    for name, how in modules.items():
        stored.matrix(f"{name}.weight_packed", [int32])
        scale = stored.matrix(f"{name}.weight_scale", FLOATS)
        n_out, groups = scale.shape

        def transposed(key: str) -> Converted:
            entry = entries[key]
            return Converted(entry.dtype, entry.shape[::-1], lambda: to_gptq(stored.read(key)))

        tensors[f"{name}.qweight"] = transposed(f"{name}.weight_packed")
        tensors[f"{name}.scales"] = transposed(f"{name}.weight_scale")
        if how.sym and f"{name}.weight_zero_point" not in entries:

            def zeros(groups: int = groups, n_out: int = n_out, bits: int = how.bits) -> np.ndarray:
                return symmetric_zeros(groups, n_out, bits)

            tensors[f"{name}.qzeros"] = Converted(int32, zeros().shape, zeros)
        else:
            stored.matrix(f"{name}.weight_zero_point", [int32])
            tensors[f"{name}.qzeros"] = transposed(f"{name}.weight_zero_point")
        # Writers that make it without act-order fill it with -1.
        key = f"{name}.weight_g_idx"
        if key in entries and not np.all(stored.read(key) == -1):
            tensors[f"{name}.g_idx"] = entries[key]
    held = {name: Words(f"{name}.weight_packed", words) for name in names}
    default = schemes[0][1]
    return View("compressed-tensors", described(default, modules), tensors, held)
