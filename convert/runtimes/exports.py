"""What an export of a GPTQ folder would be, as the same facts that a loader's rules look at.

So the advice which target loads is the verdict on the folder that the target writes, by the same rules.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.runtimes.folder import ModelFolder, Module
from lotaqaf_jax.quant.config import QuantizationConfig

__all__ = ["EXPORTS", "exported"]

_MLX_GROUPS = (32, 64, 128)
_GGUF_BLOCK = 32
_ONNX_GROUPS = (16, 32, 64, 128, 256, 512, 1024)


def exported(folder: ModelFolder, target: str) -> ModelFolder | None:
    """The folder that an export target would write; None where the target cannot hold this model.

    Args:
        folder: what is there. Only GPTQ folders that this package reads are exported.
        target: one of ``EXPORTS``.
    """
    return EXPORTS[target](folder) if folder.kind == "gptq" and folder.rules is not None else None


def _gptq(folder: ModelFolder) -> ModelFolder | None:
    return folder


def _peft(folder: ModelFolder) -> ModelFolder | None:
    """The LoRA of mu for the GPTQ folder, of one rank and alone: nothing where there is no mu."""
    if not folder.lora_ranks:
        return None
    widest = max(folder.lora_ranks.values())
    ranks = dict.fromkeys(folder.lora_ranks, widest)
    return dataclasses.replace(folder, lora_ranks=ranks, lora_rank=widest, lora_beside=())


def _gptq8(folder: ModelFolder) -> ModelFolder | None:
    """Re-grid of up to 4 bit to 8 bit symmetric, mu in its integers; groups and their order stay."""
    if any(module.bits > 4 for module in folder.modules):
        return None
    config: dict[str, Any] = {**folder.quantization, "bits": 8, "sym": True}
    if dynamic := config.get("dynamic"):
        config["dynamic"] = {
            key: {name: value for name, value in (rule or {}).items() if name not in ("bits", "sym")}
            for key, rule in dynamic.items()
        }
    modules = [dataclasses.replace(m, bits=8, sym=True, centred=True, lowest_zero=128) for m in folder.modules]
    return dataclasses.replace(
        folder,
        quantization=config,
        rules=QuantizationConfig.from_hf(config),
        modules=tuple(modules),
        lora_ranks={},
        lora_beside=(),
    )


def _awq(folder: ModelFolder) -> ModelFolder | None:
    """A repack: 4 bit, integer zero points (no mu), rows in order, groups of one size, no quantised head."""
    sizes = {module.group_size for module in folder.modules}
    fits = all(m.bits == 4 and m.in_order and m.whole_groups and m.shape[1] % 8 == 0 for m in folder.modules)
    if not fits or len(sizes) != 1 or folder.lora_ranks or folder.quantizes_head:
        return None
    config = {"quant_method": "awq", "bits": 4, "group_size": sizes.pop(), "zero_point": True, "version": "gemm"}
    tensors = {name: shape for name, shape in folder.tensors.items() if not name.endswith(".g_idx")}
    return dataclasses.replace(folder, kind="awq", quantization=config, embedded=True, rules=None, tensors=tensors)


def _mlx(folder: ModelFolder) -> ModelFolder | None:
    """Scale s and bias s * (mu - z) for each group; rows in order."""
    fits = all(m.group_size in _MLX_GROUPS and m.whole_groups and m.in_order for m in folder.modules)
    if not fits or not folder.modules:
        return None
    grid = {"bits": folder.modules[0].bits, "group_size": folder.modules[0].group_size}
    tensors = _renamed(folder, {"qweight": "weight", "scales": "scales", "qzeros": "biases"})
    return _other(folder, "mlx", tensors, {**folder.config, "quantization": grid})


def _gguf(folder: ModelFolder) -> ModelFolder | None:
    """Q4_1: blocks of 32 rows, up to 4 bit; rows in order."""

    def fits(module: Module) -> bool:
        blocks = module.shape[0] % _GGUF_BLOCK == 0 and (
            module.group_size == -1 or module.group_size % _GGUF_BLOCK == 0
        )
        return module.bits <= 4 and module.in_order and blocks

    if not all(fits(module) for module in folder.modules):
        return None
    return dataclasses.replace(_other(folder, "gguf", {}, {}), gguf=(folder.path / "model.gguf",))


def _onnx(folder: ModelFolder) -> ModelFolder | None:
    """MatMulNBits: groups are one or several blocks of at least 16 rows."""
    if any((m.shape[0] % 16 if m.group_size == -1 else m.group_size not in _ONNX_GROUPS) for m in folder.modules):
        return None
    return _other(folder, "onnx", {}, {})


def _hf16(folder: ModelFolder) -> ModelFolder | None:
    """Dequantised, mu added."""
    return _other(folder, "16-bit", _renamed(folder, {"qweight": "weight"}), folder.config)


def _other(folder: ModelFolder, kind: Any, tensors: Any, config: Any) -> ModelFolder:
    """The folder in another format, in which mu is in the weights."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    return ModelFolder(folder.path, kind, config=config, tensors=tensors)


def _renamed(folder: ModelFolder, parts: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """The tensors with the parts of quantised modules renamed, or left out; their shapes do not matter to any rule."""
    packed = {module.name for module in folder.modules}
    found = {}
    for name, shape in folder.tensors.items():
        module, _, part = name.rpartition(".")
        if module not in packed or part == "bias":
            found[name] = shape
        elif part in parts:
            found[f"{module}.{parts[part]}"] = shape
    return found


EXPORTS = {
    "gptq": _gptq,
    "gptq8": _gptq8,
    "peft": _peft,
    "awq": _awq,
    "mlx": _mlx,
    "gguf": _gguf,
    "onnx": _onnx,
    "hf16": _hf16,
}
