"""Opening a merged folder again, with its offsets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.offset import OFFSET_FOLDER, apply_offsets
from lotaqaf_jax.models import Decoder
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.models.pretrained import default_dtype
from lotaqaf_jax.quant.folder import CheckpointFolder

__all__ = ["load_merged"]


def load_merged(
    directory: str | Path,
    *,
    dtype: Any = None,
    progress: bool = True,
    place: Callable[[Decoder], Decoder] | None = None,
) -> Decoder:
    """Load a merged model, with the offsets that lie beside it in ``offset_adapter/``, if any.

    Args:
        directory: the folder of a merged model (any GPTQ folder loads too).
        dtype: the type that activations and dequantised weights are computed in; None for float32 on a CPU and
            bfloat16 elsewhere.
        progress: show a progress bar when it takes longer than a second.
        place: as of :func:`lotaqaf_jax.models.loading.load_decoder`, for a model on a mesh.

    Returns:
        The model; it computes what the adapter model computed, bit for bit.

    Raises:
        CheckpointError: the folder is missing or damaged, or the offsets do not fit.
        ConfigError: an architecture or quantisation format that cannot be computed exactly.
    """
    folder = Path(directory)
    dtype = default_dtype() if dtype is None else dtype
    model = load_decoder(CheckpointFolder(folder), dtype, progress=progress, place=place)
    beside = folder / OFFSET_FOLDER
    return apply_offsets(model, beside) if beside.is_dir() else model
