"""The quantisation config of a GPTQ checkpoint: what every module's width and group size are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant.packing import check_bits
from lotaqaf_jax.quant.zeros import check_format

__all__ = ["ModuleQuantization", "QuantizationConfig"]


@dataclasses.dataclass(frozen=True)
class ModuleQuantization:
    """How one module is quantised: width, rows in a group (-1: one group), symmetric or not, act-order."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """``quantization_config`` of config.json, or quantize_config.json, of method ``gptq``.

    ``dynamic`` holds ordered (regular expression, overrides) pairs; the first one that matches a module's name from
    its start decides, ``None`` in place of overrides meaning that the module is left in 16 bit.
    """

    default: ModuleQuantization
    checkpoint_format: str
    lm_head: bool
    dynamic: tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "quantization_config") -> QuantizationConfig:
        """Read the config as GPTQModel, AutoGPTQ, optimum and transformers write it.

        A missing ``sym`` means true, a missing ``checkpoint_format`` means ``gptq`` (v1), a missing ``group_size`` 128.

        Args:
            config: the parsed config.
            where: what to call it in errors.

        Raises:
            ConfigError: no bits, an unsupported width, method or format, or a part of the wrong type.
        """
        config = _object(config, where)
        method = config.get("quant_method") or config.get("method") or "gptq"
        if method != "gptq":
            raise ConfigError(f"{where}: quant_method is {method!r}, expected 'gptq'. Quantise the model with GPTQ.")
        if "bits" not in config:
            raise ConfigError(f"{where}: 'bits' is missing; add the width (2, 3, 4 or 8) the model was quantised to.")
        pack_dtype = config.get("pack_dtype") or "int32"
        if pack_dtype != "int32":
            raise ConfigError(
                f"{where}: pack_dtype is {pack_dtype!r}, expected 'int32'. Save the model with int32 words."
            )
        stored = config.get("checkpoint_format") or config.get("format") or "gptq"
        default = ModuleQuantization(
            bits=check_bits(config["bits"], f"{where}: bits"),
            group_size=_group_size(config.get("group_size", 128), where),
            sym=_or(config.get("sym"), True),
            desc_act=_or(config.get("desc_act"), False),
        )
        return cls(
            default=default,
            checkpoint_format=check_format(stored, f"{where}: checkpoint_format"),
            lm_head=_or(config.get("lm_head"), False),
            dynamic=_dynamic(_object(config.get("dynamic") or {}, f"{where}: dynamic"), where),
        )

    def for_module(self, name: str) -> ModuleQuantization | None:
        """How the module ``name`` is quantised, or None where ``dynamic`` leaves it in 16 bit.

        Args:
            name: full name, such as ``model.layers.0.mlp.down_proj``.
        """
        for pattern, overrides in self.dynamic:
            if re.match(pattern, name):
                if overrides is None:
                    return None
                known = {key: value for key, value in overrides if key in ("bits", "group_size", "sym", "desc_act")}
                return dataclasses.replace(self.default, **known)
        return self.default


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else bool(value)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: found {type(value).__name__}, expected an object. Restore the config file.")
    return value


def _group_size(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (value != -1 and value < 1):
        raise ConfigError(f"{where}: group_size is {value!r}, expected a positive integer, or -1 for one group.")
    return value


def _dynamic(rules: Mapping[str, Any], where: str) -> tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...]:
    parsed: list[tuple[str, tuple[tuple[str, Any], ...] | None]] = []
    for key, overrides in rules.items():
        pattern = key[2:] if key.startswith(("+:", "-:")) else key
        place = f"{where}: dynamic[{key!r}]"
        try:
            re.compile(pattern)
        except re.error as problem:
            raise ConfigError(f"{place}: not a regular expression: {problem}.") from None
        if key.startswith("-:"):
            parsed.append((pattern, None))
            continue
        overrides = _object(overrides or {}, place)
        if "bits" in overrides:
            check_bits(overrides["bits"], f"{place}: bits")
        if "group_size" in overrides:
            _group_size(overrides["group_size"], place)
        simple = {k: v for k, v in overrides.items() if isinstance(v, int | bool)}
        parsed.append((pattern, tuple(simple.items())))
    return tuple(parsed)
