"""Formats that a merged model is exported to, one module each."""

from convert.targets.awq import AWQ
from convert.targets.gptq import GPTQ
from convert.targets.gptq8 import GPTQ8
from convert.targets.hf16 import HF16
from convert.targets.mlx import MLX
from convert.targets.peft import PEFT
from convert.targets.target import EXACT, ExportReport, Source, Target, check_fit

__all__ = ["EXACT", "TARGETS", "ExportReport", "Source", "Target", "check_fit"]

TARGETS = {target.name: target for target in (GPTQ, GPTQ8, PEFT, MLX, AWQ, HF16)}
"""By the name that --target takes."""
