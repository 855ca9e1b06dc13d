"""Conversion: GPTQ in, GPTQ out, adapters and offsets beside, and the proof that nothing else changed."""

from convert.hf import write_checkpoint

__all__ = ["write_checkpoint"]
