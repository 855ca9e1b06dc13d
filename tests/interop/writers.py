"""Writes folders with compressed-tensors, mlx-lm and GPTQModel's AWQ, and reads them with the same. Has its own
environment, without us.

    python writers.py jobs.json

A job has a "kind" ("awq", "compressed-tensors" or "mlx"), a "folder", and either a "source", a 16-bit folder that is
quantised into it with the "settings", or a "weights" (.npz), a "logits" (.npy) and "input_ids" (.npy): every quantised
weight as the library dequantises it, (in, out) float32, and the logits of the model with these weights.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

State = dict[str, torch.Tensor]


def projections(model: Any) -> Any:
    """Every linear layer but the head, by name."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def modules_of(state: State, part: str) -> list[str]:
    return [name.removesuffix(f".{part}") for name in state if name.endswith(f".{part}")]


def awq_kernel(n_in: int, n_out: int, size: int) -> Any:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    sizes = {"group_size": size, "in_features": n_in, "out_features": n_out}
    return AwqTorchLinear(bits=4, sym=False, desc_act=False, bias=False, register_buffers=True, **sizes)


def write_awq(job: dict[str, Any], source: Path, folder: Path) -> None:
    """GPTQModel packs; its search for scales wants CUDA, so that each group's range is taken as it is."""
    from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear

    size = job["settings"]["group_size"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    state = dict(model.state_dict())
    for name, linear in projections(model):
        w = linear.weight.data.float()
        groups = w.reshape(w.shape[0], -1, size)
        high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(0, 15)
        steps = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15) - zeros[..., None]
        linear.weight.data = (steps * scales[..., None]).reshape(w.shape)
        kernel, bias, linear.bias = awq_kernel(w.shape[1], w.shape[0], size), linear.bias, None
        AwqGEMMLinear.pack(kernel, linear, scales, zeros)
        linear.bias = bias
        del state[f"{name}.weight"]
        state |= {f"{name}.{part}": getattr(kernel, part) for part in ("qweight", "qzeros", "scales")}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    said = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    config["quantization_config"] = said | {"modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_compressed(job: dict[str, Any], source: Path, folder: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**job["settings"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    said = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, said)
    for _, linear in projections(model):
        w = linear.weight.detach().float()
        groups = w.reshape(w.shape[0], -1, args.group_size or w.shape[1])
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        linear.weight_scale.data.copy_(scale)
        if hasattr(linear, "weight_zero_point"):
            linear.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def write_mlx(job: dict[str, Any], source: Path, folder: Path) -> None:
    import mlx.core as mx
    from mlx_lm import convert

    mx.set_default_device(mx.cpu)
    settings = dict(job["settings"])
    dense = settings.pop("dense", None)

    def chosen(path: str, _module: Any, *_: Any) -> bool:
        return re.search(dense, path) is None

    given = {} if dense is None else {"quant_predicate": chosen}
    convert(str(source), str(folder), quantize=True, **settings, **given)


def read_awq(state: State, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    size, found = config["quantization_config"]["group_size"], {}
    for name in modules_of(state, "qweight"):
        parts = [state.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
        found[name] = dequantize_gemm(*parts[:2], parts[2].float(), 4, size).float()
    return found


def read_compressed(state: State, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(**config["quantization_config"]["config_groups"]["group_0"])
    found = {}
    for name in modules_of(state, "weight_packed"):
        parts = {
            key.removeprefix(f"{name}."): state.pop(key) for key in list(state) if key.startswith(f"{name}.weight")
        }
        parts["weight_scale"] = parts["weight_scale"].float()
        found[name] = compressor.decompress(parts, scheme)["weight"].float().T
    return found


def read_torch(job: dict[str, Any], folder: Path) -> None:
    """Weights by the library's own function; logits by transformers in float32, as a 16-bit model with these."""
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    weights = (read_awq if job["kind"] == "awq" else read_compressed)(state, config)
    np.savez(job["weights"], **{name: weight.numpy() for name, weight in weights.items()})
    plain = AutoConfig.from_pretrained(folder)
    del plain.quantization_config
    model = AutoModelForCausalLM.from_config(plain, dtype=torch.float32).eval()
    state = {key: tensor.float() for key, tensor in state.items()}
    state |= {f"{name}.weight": weight.T for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(np.load(job["input_ids"])).long()).logits
    np.save(job["logits"], logits.numpy())


def read_mlx(job: dict[str, Any], folder: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    mx.set_default_device(mx.cpu)
    model, _ = load(str(folder))
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "scales"):
            scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
            weight = mx.dequantize(module.weight, scales, biases, module.group_size, module.bits)
            found[name] = np.array(weight).T
    np.savez(job["weights"], **found)
    logits = model(mx.array(np.load(job["input_ids"])))
    np.save(job["logits"], np.array(logits.astype(mx.float32)))


WRITERS = {"awq": write_awq, "compressed-tensors": write_compressed, "mlx": write_mlx}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    failed = {}
    for job in jobs:
        folder = Path(job["folder"])
        try:
            if "source" in job:
                source = Path(job["source"])
                WRITERS[job["kind"]](job, source, folder)
                for path in source.glob("token*.json"):
                    if not (folder / path.name).exists():
                        shutil.copyfile(path, folder / path.name)
            else:
                (read_mlx if job["kind"] == "mlx" else read_torch)(job, folder)
        except Exception:
            failed[job["folder"]] = traceback.format_exc()
    with open(sys.argv[1] + ".failed", "w", encoding="utf-8") as file:
        json.dump(failed, file)


if __name__ == "__main__":
    main()
