"""Other formats of integers with a scale and a zero point for each group, shown as GPTQ and written back.

A module a format: pure functions on arrays, both ways, and ``view``, which shows a folder of it as a GPTQ one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant.config import QuantizationConfig
from lotaqaf_jax.quant.files import TensorEntry
from lotaqaf_jax.quant.formats import awq, compressed, mlx
from lotaqaf_jax.quant.formats.view import Converted, View, Words

__all__ = ["FORMATS", "Converted", "View", "Words", "method_of", "read_quantization", "view_of"]

FORMATS = ("gptq", "awq", "compressed-tensors", "mlx")


def method_of(config: Mapping[str, Any], said: Any, where: str) -> str:
    """Which of :data:`FORMATS` a folder is in.

    Args:
        config: its config.json.
        said: its quantisation config, None without one.
        where: what to call that in errors.

    Returns:
        The format; "gptq" without a quantisation config.

    Raises:
        ConfigError: another method.
    """
    named = (said.get("quant_method") or said.get("method")) if isinstance(said, Mapping) else None
    if named is None:
        return "mlx" if isinstance(config.get("quantization"), Mapping) else "gptq"
    if named not in FORMATS[:3]:
        raise ConfigError(
            f"{where}: quant_method is {named!r}, expected one of {', '.join(FORMATS[:3])}, or none in a folder of "
            "MLX. Take the model in one of these formats, or quantise it from 16 bit with `python -m convert quantize`."
        )
    return str(named)


def _settings(method: str, config: Mapping[str, Any], said: Any, where: str) -> tuple[Any, str]:
    return (
        (config["quantization"], where.replace("quantization_config", "quantization"))
        if method == "mlx"
        else (said, where)
    )


def read_quantization(
    config: Mapping[str, Any], where: str = "config.json: quantization_config"
) -> QuantizationConfig | None:
    """How most modules are quantised, by config.json alone; None for a 16-bit model.

    Raises:
        ConfigError: a method or setting that is not supported.
    """
    said = config.get("quantization_config")
    method = method_of(config, said, where)
    if said is None and method == "gptq":
        return None
    settings, where = _settings(method, config, said, where)
    readers = {"awq": awq.read_config, "compressed-tensors": compressed.read_config, "mlx": mlx.read_config}
    return readers.get(method, QuantizationConfig.from_hf)(settings, where)


def view_of(method: str, config: Mapping[str, Any], said: Any, entries: Mapping[str, TensorEntry], where: str) -> View:
    """A folder of another format as a GPTQ one.

    Args:
        method: of :func:`method_of`, not "gptq".
        config: its config.json.
        said: its quantisation config.
        entries: the tensors of its files.
        where: what to call the quantisation config in errors.

    Raises:
        ConfigError: a setting that is not supported.
        CheckpointError: a tensor of a quantised module is missing, or of another type.
    """
    settings, where = _settings(method, config, said, where)
    if method == "awq":
        return awq.view(awq.read_config(settings, where), entries)
    return (mlx if method == "mlx" else compressed).view(settings, entries, where)
