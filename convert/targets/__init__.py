"""Formats that a merged model is exported to, one module each."""

from convert.targets.awq import AWQ
from convert.targets.gguf import GGUF
from convert.targets.gptq import BASE, GPTQ
from convert.targets.gptq8 import GPTQ8
from convert.targets.hf16 import HF16
from convert.targets.mlx import MLX
from convert.targets.onnx import ONNX
from convert.targets.peft import PEFT
from convert.targets.target import EXACT, ExportReport, Source, Target, check_fit

__all__ = ["EXACT", "TARGETS", "ExportReport", "Source", "Target", "check_fit"]

TARGETS = {target.name: target for target in (BASE, GPTQ, GPTQ8, PEFT, MLX, AWQ, GGUF, ONNX, HF16)}
"""By the name that --target takes."""
