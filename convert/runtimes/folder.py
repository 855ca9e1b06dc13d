"""What lies in a model folder, as far as a runtime's loader cares: read from configs, headers and zero points alone.

No weight is read: of the tensors only names and shapes, and of GPTQ modules ``qzeros`` and ``g_idx``, one at a time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.offset import OFFSET_FOLDER
from convert.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.quant.config import QuantizationConfig
from lotaqaf_jax.quant.folder import INDEX, CheckpointFolder, read_json
from lotaqaf_jax.quant.weight import trivial_g_idx
from lotaqaf_jax.quant.zeros import decode_zeros

__all__ = ["Kind", "ModelFolder", "Module", "read_folder"]

_GENAI_CONFIG = "genai_config.json"
Kind = Literal["gptq", "awq", "mlx", "compressed-tensors", "16-bit", "gguf", "onnx", "other"]


@dataclasses.dataclass(frozen=True)
class Module:
    """One quantised linear layer W (in, out).

    Attributes:
        name: its full name.
        bits: width of its integers.
        group_size: rows of a group, -1 for one group.
        sym: what the config says of its symmetry.
        desc_act: what the config says of act-order.
        shape: (in, out).
        centred: all its true zero points are 2**(bits-1): symmetric in effect, whatever the config says.
        lowest_zero: its smallest true zero point.
        in_order: row i belongs to group i // group_size, so that g_idx may be left out.
    """

    name: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    shape: tuple[int, int]
    centred: bool
    lowest_zero: int
    in_order: bool

    @property
    def whole_groups(self) -> bool:
        """Whether the groups divide the rows."""
        return self.group_size == -1 or self.shape[0] % self.group_size == 0


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder as a loader sees it.

    Attributes:
        path: the folder.
        kind: the format of its weights; "other" for a ``quant_method`` that is not told apart here.
        config: config.json, of an ONNX folder genai_config.json; empty where there is none.
        quantization: the quantisation config as written: config.json's, else quantize_config.json.
        embedded: whether config.json holds it.
        rules: the same, read, for a GPTQ folder whose format this package reads.
        tensors: shape of every tensor by name.
        modules: the quantised modules of a GPTQ (but ``gptq_p``) or AWQ folder.
        lora_ranks: rank of every module of the LoRA in ``offset_adapter/``; empty where there is none.
        lora_rank: the rank that its config gives as default.
        lora_beside: other .safetensors files in offset_adapter/.
        gguf: the ``.gguf`` files.
    """

    path: Path
    kind: Kind
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quantization: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    embedded: bool = True
    rules: QuantizationConfig | None = None
    tensors: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    modules: tuple[Module, ...] = ()
    lora_ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lora_rank: int = 0
    lora_beside: tuple[str, ...] = ()
    gguf: tuple[Path, ...] = ()

    @property
    def checkpoint_format(self) -> str:
        """Of a GPTQ folder: how its zero points are stored; missing means ``gptq`` (v1)."""
        return self.quantization.get("checkpoint_format") or self.quantization.get("format") or "gptq"

    @property
    def quantizes_head(self) -> bool:
        """Whether the output head is quantised."""
        return any(name in self.tensors for name in ("lm_head.qweight", "lm_head.scales"))


def read_folder(path: str | Path) -> ModelFolder:
    """Read what loaders look at.

    Args:
        path: the folder of a model: GPTQ with or without ``offset_adapter/``, AWQ, MLX, compressed-tensors, 16 bit, or
            with a ``.gguf`` file, or of onnxruntime-genai.

    Raises:
        CheckpointError: no such folder, or it holds no model, or a damaged one.
        ConfigError: a GPTQ config that cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: {'not a folder' if path.exists() else 'no such folder'}. Pass a model's folder."
        )
    gguf = tuple(sorted(path.glob("*.gguf")))
    if not any(path.glob("*.safetensors")):
        if gguf:
            return ModelFolder(path, "gguf", gguf=gguf)
        if not (path / _GENAI_CONFIG).is_file():
            raise CheckpointError(
                f"{path}: holds neither .safetensors nor .gguf files, nor {_GENAI_CONFIG}. Pass a model's folder."
            )
        return ModelFolder(path, "onnx", config=_genai(path))
    config = read_json(path / "config.json")
    embedded = config.get("quantization_config")
    beside = path / "quantize_config.json"
    quantization = embedded if isinstance(embedded, dict) else read_json(beside) if beside.is_file() else {}
    tensors = _shapes(path)
    found = ModelFolder(
        path,
        _kind(config, quantization, tensors),
        config=config,
        quantization=quantization,
        embedded=isinstance(embedded, dict),
        tensors=tensors,
        gguf=gguf,
    )
    if found.kind == "gptq":
        if found.checkpoint_format != "gptq_p":  # bit planes: the same names and shapes, but nobody's zero points
            folder = CheckpointFolder(path)
            assert folder.quantization is not None
            found = dataclasses.replace(
                found, rules=folder.quantization, modules=tuple(_modules(folder, folder.quantization))
            )
        ranks, rank = _lora(path / OFFSET_FOLDER)
        others = {file.name for file in (path / OFFSET_FOLDER).glob("*.safetensors")} - {ADAPTER_WEIGHTS}
        found = dataclasses.replace(found, lora_ranks=ranks, lora_rank=rank, lora_beside=tuple(sorted(others)))
    elif found.kind == "awq":
        found = dataclasses.replace(found, modules=tuple(_awq_modules(found)))
    return found


def _genai(path: Path) -> dict[str, Any]:
    config = read_json(path / _GENAI_CONFIG)
    graph = (config.get("model") or {}).get("decoder", {}).get("filename")
    if not graph or not (path / graph).is_file():
        raise CheckpointError(
            f"{path / _GENAI_CONFIG}: found {graph!r} as model.decoder.filename, expected a file beside it. Export the "
            "model again."
        )
    return config


def _kind(config: Mapping[str, Any], quantization: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Kind:
    packed = any(name.endswith(".qweight") for name in tensors)
    if isinstance(config.get("quantization"), dict) and not packed:
        return "mlx"
    method = quantization.get("quant_method") or quantization.get("method")
    if method in ("gptq", "awq", "compressed-tensors"):
        return method
    if method is None and packed:
        return "gptq"  # as AutoGPTQ wrote it
    return "other" if quantization else "16-bit"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, whatever its type: MLX and compressed-tensors hold types that GPTQ folders do not."""
    if (path / INDEX).is_file():
        shards = sorted(path / name for name in set(read_json(path / INDEX).get("weight_map", {}).values()))
    elif (path / "model.safetensors").is_file():
        shards = [path / "model.safetensors"]
    else:
        shards = sorted(path.glob("*.safetensors"))
    return {name: shape for shard in shards for name, shape in _header(shard).items()}


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name: tuple(item["shape"]) for name, item in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as problem:
        raise CheckpointError(f"{path}: its header cannot be read ({problem}). Download it again.") from None


def _modules(folder: CheckpointFolder, rules: QuantizationConfig) -> list[Module]:
    found = []
    for name in (key.removesuffix(".qweight") for key in folder.tensors if key.endswith(".qweight")):
        # A module that is packed although `dynamic` leaves it out fails everywhere; loading it says so.
        rule = rules.for_module(name) or rules.default
        n_out = folder.tensors[f"{name}.qweight"].shape[1]
        n_in = folder.tensors[f"{name}.qweight"].shape[0] * 32 // rule.bits
        in_order = True
        if f"{name}.g_idx" in folder.tensors:
            g_idx = folder.read(f"{name}.g_idx")
            n_in = len(g_idx)
            in_order = np.array_equal(g_idx, trivial_g_idx(n_in, rule.group_size))
        zeros = np.asarray(decode_zeros(folder.read(f"{name}.qzeros"), rule.bits, n_out, rules.checkpoint_format))
        found.append(
            Module(
                name,
                **dataclasses.asdict(rule),
                shape=(n_in, n_out),
                centred=bool((zeros == 2 ** (rule.bits - 1)).all()),
                lowest_zero=int(zeros.min(initial=2**rule.bits - 1)),
                in_order=in_order,
            )
        )
    return found


def _awq_modules(folder: ModelFolder) -> list[Module]:
    """Its words are packed along the outputs: qweight is (in, out * bits / 32)."""
    config = folder.quantization
    bits = config.get("bits") or config.get("w_bit") or 4
    group_size = config.get("group_size") or config.get("q_group_size") or 128
    found = []
    for name, shape in folder.tensors.items():
        if name.endswith(".qweight") and len(shape) == 2:
            size = shape[0], shape[1] * 32 // bits
            found.append(Module(name.removesuffix(".qweight"), bits, group_size, False, False, size, False, 0, True))
    return found


def _lora(path: Path) -> tuple[dict[str, int], int]:
    if not path.is_dir():
        return {}, 0
    config = read_json(path / ADAPTER_CONFIG)
    suffix = ".lora_A.weight"
    shapes = _header(path / ADAPTER_WEIGHTS)
    names = [name for name in shapes if name.endswith(suffix)]
    ranks = {name.removeprefix(PREFIX).removesuffix(suffix): shapes[name][0] for name in names}
    return ranks, int(config.get("r") or 0)
