"""The small model and data shipped with the package, which ``train.py`` uses when it is given no arguments.

Made by ``scripts/make_default_model.py``. The model reads messages to a toy order desk; the data teaches it a notation
that it was not pretrained on.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEFAULT_HELDOUT", "DEFAULT_MODEL", "DEFAULT_RUN", "DEFAULT_TRAIN"]

DEFAULT_RUN = Path(__file__).parent / "default"
"""Folder of all that follows, with the settings of the run in train.yaml."""

DEFAULT_MODEL = DEFAULT_RUN / "model"
"""Checkpoint folder: a Qwen2 decoder in GPTQ, with its tokenizer and chat template."""

DEFAULT_TRAIN = DEFAULT_RUN / "data" / "train.jsonl"
"""Rows to train on: instruction, input, output."""

DEFAULT_HELDOUT = DEFAULT_RUN / "data" / "heldout.jsonl"
"""Rows to evaluate on; no message of theirs is in :data:`DEFAULT_TRAIN`."""
