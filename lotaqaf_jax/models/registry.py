"""Short names of known checkpoints, with the published settings for their size."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from lotaqaf_jax.errors import CheckpointError

__all__ = ["KNOWN_MODELS", "KnownModel", "local_folder"]


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """A checkpoint on the hub, and the paper's settings for its size; omega is 0.75 * rank."""

    hub_name: str
    rank: int
    batch_size: int = 64

    @property
    def omega(self) -> float:
        """The published threshold, 0.75 * rank."""
        return 0.75 * self.rank

    @property
    def large(self) -> bool:
        """Whether it counts among the paper's large models, which have half the rank and smaller learning rates."""
        return self.rank < 64


def _qwen(size: str, rank: int) -> KnownModel:
    return KnownModel(f"Qwen/Qwen2.5-{size}-Instruct-GPTQ-Int4", rank)


KNOWN_MODELS = {
    "qwen2.5-0.5b-gptq": _qwen("0.5B", 64),
    "qwen2.5-1.5b-gptq": _qwen("1.5B", 64),
    "qwen2.5-3b-gptq": _qwen("3B", 64),
    "qwen2.5-7b-gptq": _qwen("7B", 64),
    "qwen2.5-14b-gptq": _qwen("14B", 64),
    "qwen2.5-32b-gptq": _qwen("32B", 32),
    "qwen2.5-72b-gptq": _qwen("72B", 32),
    "llama-3.2-1b-gptq": KnownModel("ModelCloud/Llama-3.2-1B-Instruct-gptqmodel-4bit-vortex-v2.5", 64),
    "llama-3.2-3b-gptq": KnownModel("ModelCloud/Llama-3.2-3B-Instruct-gptqmodel-4bit-vortex-v3", 64),
    "llama-3.1-8b-gptq": KnownModel("hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4", 64),
    "llama-3.1-70b-gptq": KnownModel("hugging-quants/Meta-Llama-3.1-70B-Instruct-GPTQ-INT4", 32),
    "llama-3.3-70b-gptq": KnownModel("ModelCloud/Llama-3.3-70B-Instruct-gptq-4bit", 32),
}

# Owner and model, each beginning with a letter or digit: ./model and ~/model are paths.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def local_folder(path_or_name: str | Path) -> Path:
    """The folder of a checkpoint: a path as it is; a known or hub name downloaded into the hub's cache.

    Args:
        path_or_name: a folder, a key of :data:`KNOWN_MODELS`, or a hub name such as ``owner/model``.

    Raises:
        CheckpointError: no such folder or name, or the hub cannot be reached; says which folder to pass instead.
    """
    text = str(path_or_name)
    path = Path(path_or_name).expanduser()
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise CheckpointError(f"--model {text}: not a folder. Pass the folder that holds it.")
    known = KNOWN_MODELS.get(text.lower())
    if known is None and not _HUB_NAME.fullmatch(text):
        raise CheckpointError(
            f"--model {text}: no such folder, and not a known name. Pass the folder of a GPTQ checkpoint, a hub name "
            f"(owner/model), or one of: {', '.join(sorted(KNOWN_MODELS))}."
        )
    name = known.hub_name if known else text
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED))
    except Exception as problem:  # The hub client raises a dozen unrelated types for "could not download".
        raise CheckpointError(
            f"--model {text}: no such folder, and {name} could not be downloaded from the hub "
            f"({type(problem).__name__}). Without a network, download {name} elsewhere and pass its folder: "
            f"--model /path/to/{name.split('/')[-1]}."
        ) from problem
