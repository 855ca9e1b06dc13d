"""MLX, mode ``affine``.

    weight  (out, in*bits/32)   uint32   GPTQ's words, transposed
    scales  (out, in/g)         float    of either sign
    biases  (out, in/g)         the same type
    W[i, j] = scales[j, i // g] * q[i, j] + biases[j, i // g]

MLX's quantiser puts the bias on the weight of the largest size in a group, and takes scales = -biases / z with an
integer z. That z is the zero point here: W = scales * (q - z), with scales of either sign. Since scales are rounded to
their type, biases / scales + z is not quite 0: at most z * 2^-11 for float16 and z * 2^-8 for bfloat16, in steps of the
grid, the same for all weights of a group. This residual is left out. A folder in which it is larger than
:data:`LARGEST_RESIDUAL` (8 bit in a 16-bit type, or a quantiser that chooses biases otherwise) is refused: it would
need an offset in the base.

An embedding that is quantised too is dequantised, by its own biases, to the type of its scales.

Source: MLX 0.32, ``mlx.core.quantize``, and folders that mlx-lm 0.32 writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.quant.config import ModuleQuantization, QuantizationConfig
from lotaqaf_jax.quant.files import TensorEntry
from lotaqaf_jax.quant.formats.stream import pack_rows, unpack_rows
from lotaqaf_jax.quant.formats.view import FLOATS, Converted, Stored, View, Words, described
from lotaqaf_jax.quant.packing import packed_size

__all__ = ["LARGEST_RESIDUAL", "dequantize", "read_config", "to_gptq", "view", "words", "zero_points"]

LARGEST_RESIDUAL = 1 / 16
"""In steps of the grid."""
_WORTH_SAYING = 1e-4
_EMBEDDING = "model.embed_tokens"
_ROWS = 1024  # of an embedding, dequantised at once


def to_gptq(weight: np.ndarray) -> np.ndarray:
    """GPTQ's ``qweight`` (in*bits/32, out) int32 from MLX's ``weight``: the transpose, a view."""
    return weight.view(np.int32).T


def words(qweight: np.ndarray) -> np.ndarray:
    """MLX's ``weight`` (out, in*bits/32) uint32 from GPTQ's ``qweight``; the inverse of :func:`to_gptq`."""
    return np.ascontiguousarray(qweight.T).view(np.uint32)


def zero_points(scales: np.ndarray, biases: np.ndarray, bits: int, name: str) -> tuple[np.ndarray, float]:
    """z = round(-biases / scales), 0 where the scale is 0 (and with it the bias).

    Args:
        scales: (out, groups).
        biases: likewise.
        bits: width.
        name: what to call the module in errors.

    Returns:
        (out, groups) uint8, and the largest |biases / scales + z|.

    Raises:
        CheckpointError: a zero point outside {0, ..., 2**bits - 1}; a residual above :data:`LARGEST_RESIDUAL`.
    """
    scale, bias = scales.astype(np.float32), biases.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exact = np.where((scale == 0) & (bias == 0), np.float32(0), -bias / scale)
    zeros = np.round(exact)
    outside = ~((zeros >= 0) & (zeros <= 2**bits - 1))
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise CheckpointError(
            f"{name}.biases: {np.count_nonzero(outside)} of {outside.size} zero points -biases/scales lie outside 0 to "
            f"{2**bits - 1}, the first, {exact[place]:g}, at {place}: the grid of that group does not hold 0. Quantise "
            "the 16-bit model with `python -m convert quantize`."
        )
    residual = float(np.max(np.abs(exact - zeros), initial=0))
    if residual > LARGEST_RESIDUAL:
        raise CheckpointError(
            f"{name}.biases: -biases/scales is up to {residual:.3g} of a step from an integer zero point, expected at "
            f"most {LARGEST_RESIDUAL:g}. A grid with a fractional zero point cannot be trained on. Quantise with 4 bit "
            "or fewer, with 8 bit and scales in float32, or the 16-bit model with `python -m convert quantize`."
        )
    return zeros.astype(np.uint8), residual


def dequantize(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """scales * q + biases, (out, in), computed in float32 and rounded once to the type of ``scales``."""
    n_out, n_in = len(weight), weight.shape[1] * 32 // bits
    found = np.empty((n_out, n_in), scales.dtype)
    for start in range(0, n_out, _ROWS):
        rows = slice(start, start + _ROWS)
        scale, bias = (np.repeat(part[rows].astype(np.float32), group_size, axis=1) for part in (scales, biases))
        found[rows] = scale * unpack_rows(weight[rows], bits, n_in) + bias
    return found


def _module(settings: Mapping[str, Any], where: str) -> ModuleQuantization:
    """Width and group size that ``settings`` say.

    Raises:
        ConfigError: another mode, or a width or group size that is not supported.
    """
    mode = settings.get("mode", "affine")
    if mode != "affine":
        raise ConfigError(f"{where}: mode is {mode!r}, expected 'affine', integers with a scale and a bias.")
    known = {"bits": settings.get("bits", 4), "group_size": settings.get("group_size", 64), "sym": False}
    return QuantizationConfig.from_hf(known, where).default


def read_config(config: Mapping[str, Any], where: str) -> QuantizationConfig:
    """How most modules are quantised: ``quantization`` of config.json.

    Raises:
        ConfigError: another mode than affine, or a width that is not supported (5 and 6 bit are MLX's alone).
    """
    return described(_module(config, where), {})


def view(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], where: str) -> View:
    """An MLX folder as a GPTQ one.

    Args:
        config: ``quantization`` of its config.json.
        entries: the tensors of its files.
        where: what to call the config in errors.

    Raises:
        ConfigError: as :func:`read_config`.
        CheckpointError: a tensor of a quantised module is missing or of another type.
    """
    stored, int32 = Stored(entries), np.dtype(np.int32)
    default, worst = _module(config, where), _Worst()
    names = stored.modules("scales")
    tensors = stored.others(f"{name}.{part}" for name in names for part in ("weight", "scales", "biases"))
    modules = {}
    for name in names:
        own = config.get(name)
        how = _module(own, f"{where}: {name}") if isinstance(own, Mapping) else default
        n_out, columns = stored.matrix(f"{name}.weight", [np.uint32]).shape
        scales = stored.matrix(f"{name}.scales", FLOATS)
        stored.matrix(f"{name}.biases", [scales.dtype])
        groups = scales.shape[1]

        def affine(name: str = name) -> tuple[np.ndarray, np.ndarray]:
            return stored.read(f"{name}.scales"), stored.read(f"{name}.biases")

        if name == _EMBEDDING:
            shape = (n_out, columns * 32 // how.bits)

            def table(name: str = name, how: ModuleQuantization = how) -> np.ndarray:
                worst.embedding = how.bits
                return dequantize(stored.read(f"{name}.weight"), *affine(name), how.bits, how.group_size)

            tensors[f"{name}.weight"] = Converted(scales.dtype, shape, table)
            continue

        def zeros(name: str = name, bits: int = how.bits) -> np.ndarray:
            found, residual = zero_points(*affine(name), bits, name)
            worst.see(residual, name)
            return pack_rows(np.ascontiguousarray(found.T), bits)

        def qweight(key: str = f"{name}.weight") -> np.ndarray:
            return to_gptq(stored.read(key))

        def transposed(key: str = f"{name}.scales") -> np.ndarray:
            return stored.read(key).T

        tensors[f"{name}.qweight"] = Converted(int32, (columns, n_out), qweight)
        tensors[f"{name}.qzeros"] = Converted(int32, (groups, packed_size(n_out, how.bits)), zeros)
        tensors[f"{name}.scales"] = Converted(scales.dtype, (groups, n_out), transposed)
        modules[name] = how
    held = {name: Words(f"{name}.weight", words) for name in modules}
    return View("mlx", described(default, modules), tensors, held, worst.notes)


class _Worst:
    """What was met while tensors were converted."""

    def __init__(self) -> None:
        self.residual, self.name, self.embedding = 0.0, "", 0

    def see(self, residual: float, name: str) -> None:
        """Keep the largest residual and whose it is."""
        if residual > self.residual:
            self.residual, self.name = residual, name

    def notes(self) -> tuple[str, ...]:
        found = []
        if self.residual > _WORTH_SAYING:
            found.append(
                f"MLX's biases are not whole multiples of the scales: zero points are rounded to integers, by up to "
                f"{self.residual:.2g} of a step (in {self.name}). Logits differ from MLX's by that."
            )
        if self.embedding:
            found.append(f"{_EMBEDDING} is quantised to {self.embedding} bit; it is dequantised, and is not trained.")
        return tuple(found)
