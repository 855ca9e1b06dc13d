"""Errors that a user can act on.

Every one is a sentence that names the thing (tensor, row, flag), what was found, what was expected and the next
step. The command-line programs print it without a traceback and leave with status 2; in a library call it is an
ordinary exception. A programming error stays a ``TypeError`` or ``ValueError`` with its traceback.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LotaError",
    "OutputError",
    "TrainingError",
    "VerificationError",
]


class LotaError(Exception):
    """Base of all errors that the command line reports as one sentence with exit status 2."""


class ConfigError(LotaError, ValueError):
    """A flag, a model config or a quantisation config that is missing, contradictory or out of range."""


class CheckpointError(LotaError, ValueError):
    """A checkpoint folder, shard or tensor that is missing, truncated, corrupt or of an unsupported format."""


class DataError(LotaError, ValueError):
    """A dataset, column or row that cannot be used."""


class AdapterError(LotaError, ValueError):
    """An adapter that does not fit the model, or that was trained on another base."""


class OutputError(LotaError, OSError):
    """A folder or file that cannot be written: no space, no permission."""


class TrainingError(LotaError, RuntimeError):
    """Training that cannot go on: a NaN or infinite loss or gradient."""


class VerificationError(LotaError, RuntimeError):
    """A written checkpoint that is not what it has to be."""
