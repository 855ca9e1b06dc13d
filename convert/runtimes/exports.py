"""What an export of a GPTQ folder would be, as the same facts that a loader's rules look at.

So the advice which target loads is the verdict on the folder that the target writes, by the same rules.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.runtimes.folder import ModelFolder
from convert.targets import TARGETS
from lotaqaf_jax.quant.config import QuantizationConfig

__all__ = ["EXPORTS", "exported"]


def exported(folder: ModelFolder, target: str) -> ModelFolder | None:
    """The folder that an export target would write; None where the target cannot hold this model.

    Args:
        folder: what is there. Only GPTQ folders that this package reads are exported.
        target: one of ``EXPORTS``.
    """
    held = TARGETS[target]
    misfits = (why for m in folder.modules for why in held.misfits(m.bits, m.group_size, m.shape, m.in_order))
    if folder.kind != "gptq" or folder.rules is None or next(misfits, None):
        return None
    return EXPORTS[target](folder)


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
    """A repack: integer zero points (no mu), groups of one size, no quantised head."""
    sizes = {module.group_size for module in folder.modules}
    if len(sizes) != 1 or folder.lora_ranks or folder.quantizes_head:
        return None
    config = {"quant_method": "awq", "bits": 4, "group_size": sizes.pop(), "zero_point": True, "version": "gemm"}
    tensors = {name: shape for name, shape in folder.tensors.items() if not name.endswith(".g_idx")}
    return dataclasses.replace(folder, kind="awq", quantization=config, embedded=True, rules=None, tensors=tensors)


def _mlx(folder: ModelFolder) -> ModelFolder | None:
    """Scale s and bias s * (mu - z) for each group."""
    if not folder.modules:
        return None
    grid = {"bits": folder.modules[0].bits, "group_size": folder.modules[0].group_size}
    tensors = _renamed(folder, {"qweight": "weight", "scales": "scales", "qzeros": "biases"})
    return _other(folder, "mlx", tensors, {**folder.config, "quantization": grid})


def _gguf(folder: ModelFolder) -> ModelFolder | None:
    """One file."""
    return dataclasses.replace(_other(folder, "gguf", {}, {}), gguf=(folder.path / "model.gguf",))


def _onnx(folder: ModelFolder) -> ModelFolder | None:
    """A graph, whose tensors no rule looks at."""
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
