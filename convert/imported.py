"""Quantised folder -> Flax state in an Orbax checkpoint, and back to a decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from convert.fingerprint import fingerprint
from convert.gptq import CONFIG_FILES
from convert.hf import copy_companions
from convert.writing import new_folder, write_json
from lotaqaf_jax.errors import CheckpointError
from lotaqaf_jax.models import Decoder, DecoderConfig, DecoderSpec, LinearSpec, QuantSpec
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.models.pretrained import default_dtype
from lotaqaf_jax.quant.folder import CheckpointFolder, read_json

__all__ = ["import_checkpoint", "is_imported", "load_imported"]

_MANIFEST = "manifest.json"
_FORMAT = "lotaqaf_jax import"


def is_imported(directory: str | Path) -> bool:
    """Whether the folder was written by :func:`import_checkpoint`."""
    manifest = Path(directory) / _MANIFEST
    return manifest.is_file() and read_json(manifest).get("format") == _FORMAT


def _flat(state: nnx.State) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def import_checkpoint(
    base: CheckpointFolder, directory: str | Path, *, overwrite: bool = False, progress: bool = True
) -> None:
    """Write the packed Flax state of a quantised (or 16-bit) checkpoint as an Orbax checkpoint.

    The folder holds ``state/`` (Orbax: every array of the decoder, layers stacked, words packed), ``config.json``,
    tokenizer and generation files, and ``manifest.json``, which says how every weight is held and names the base.
    Words are in GPTQ's order, whatever the format of the base. The config of another format says nothing of them and is
    left out of config.json, so that an export writes GPTQ, with a config of its own.

    Args:
        base: the checkpoint.
        directory: the folder to write.
        overwrite: replace an import that is there.
        progress: show progress bars when it takes longer than a second.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: its format is not supported, or the folder is not empty.
        OutputError: the folder cannot be written.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    model = load_decoder(base, default_dtype(), progress=progress)
    manifest = {
        "format": _FORMAT,
        "format_version": 1,
        "spec": _spec_to_json(model.spec),
        "base_model_name_or_path": str(base.path),
        "base_fingerprint": fingerprint(base, progress=progress) if base.quantized_modules else None,
    }
    with new_folder(directory, overwrite=overwrite, needed=base.nbytes, sources=[base.path]) as folder:
        ocp.save(folder / "state", _flat(nnx.split(model)[1]))
        if base.format == "gptq":
            copy_companions(base.path, folder)
        else:
            copy_companions(base.path, folder, skip=CONFIG_FILES)
            said = ("quantization_config", "quantization")
            write_json(folder / "config.json", {key: value for key, value in base.config.items() if key not in said})
        write_json(folder / _MANIFEST, manifest)


def load_imported(directory: str | Path, *, dtype: Any = None) -> Decoder:
    """The decoder of a folder that :func:`import_checkpoint` wrote.

    Args:
        directory: the folder.
        dtype: the type that activations and dequantised weights are computed in; None for float32 on a CPU and
            bfloat16 elsewhere.

    Raises:
        CheckpointError: the folder was not written by an import, or is damaged.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    folder = Path(directory)
    if not is_imported(folder):
        raise CheckpointError(f"{folder}: not an imported model. Pass a folder that `python -m convert import` wrote.")
    config = DecoderConfig.from_hf(read_json(folder / "config.json"))
    spec = _spec_from_json(read_json(folder / _MANIFEST)["spec"])
    dtype = default_dtype() if dtype is None else dtype
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, spec, dtype)))
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed) for name, leaf in _flat(abstract).items()
    }
    try:
        arrays = ocp.load(folder / "state", wanted)
    except (ValueError, KeyError, FileNotFoundError) as problem:
        raise CheckpointError(f"{folder / 'state'}: cannot be read ({problem}). Import the model again.") from problem
    paths = jax.tree_util.tree_leaves_with_path(abstract)
    leaves = [arrays[jax.tree_util.keystr(path)] for path, _ in paths]
    return nnx.merge(graph, jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), leaves))


def _name(dtype: Any) -> str:
    return jnp.dtype(dtype).name


def _linear_to_json(spec: LinearSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    return dataclasses.asdict(spec) | {"dtype": _name(spec.dtype), "bias_dtype": _name(spec.bias_dtype)}


def _linear_from_json(found: dict[str, Any] | None) -> LinearSpec | None:
    if found is None:
        return None
    quant = None if found["quant"] is None else QuantSpec(**found["quant"])
    types = {key: jnp.dtype(found[key]) for key in ("dtype", "bias_dtype")}
    return LinearSpec(**(found | types | {"quant": quant}))


def _spec_to_json(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "layers": [{path: _linear_to_json(linear) for path, linear in layer} for layer in spec.layers],
        "head": _linear_to_json(spec.head),
        "embed_dtype": _name(spec.embed_dtype),
        "norm_dtype": _name(spec.norm_dtype),
    }


def _spec_from_json(found: dict[str, Any]) -> DecoderSpec:
    layers = tuple(tuple((path, _linear_from_json(item)) for path, item in layer.items()) for layer in found["layers"])
    return DecoderSpec(
        layers=layers,  # type: ignore[arg-type]
        head=_linear_from_json(found["head"]),
        embed_dtype=jnp.dtype(found["embed_dtype"]),
        norm_dtype=jnp.dtype(found["norm_dtype"]),
    )
