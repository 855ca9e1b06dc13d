"""Conversion: 16-bit to GPTQ, GPTQ in, GPTQ out, adapters and offsets beside, and the proof that nothing else changed.

>>> import convert
>>> convert.quantize("folder/of/16/bits", "folder/of/the/base", calibration="text.jsonl")  # doctest: +SKIP
>>> convert.save_pretrained(merged, "output/merged", base="folder/of/the/base")  # doctest: +SKIP
"""

from convert.adapter import load_adapter, save_adapter
from convert.fingerprint import fingerprint
from convert.gptq import export_gptq
from convert.hf import write_checkpoint
from convert.imported import import_checkpoint, load_imported
from convert.merged import load_merged
from convert.quantize import LayerError, QuantizeReport, quantize
from convert.runtimes import RUNTIMES, Verdict, check_runtime
from convert.save import merge_and_save, save_pretrained
from convert.targets import TARGETS, ExportReport
from convert.verify import ModuleReport, Report, verify

__all__ = [
    "RUNTIMES",
    "TARGETS",
    "ExportReport",
    "LayerError",
    "ModuleReport",
    "QuantizeReport",
    "Report",
    "Verdict",
    "check_runtime",
    "export_gptq",
    "fingerprint",
    "import_checkpoint",
    "load_adapter",
    "load_imported",
    "load_merged",
    "merge_and_save",
    "quantize",
    "save_adapter",
    "save_pretrained",
    "verify",
    "write_checkpoint",
]
