"""The rules of other people's loaders: each is broken once in a folder that loads otherwise, and is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.__main__ import main
from convert.offset import OFFSET_FILE, OFFSET_FOLDER
from convert.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, lora_config
from lotaqaf_jax.errors import CheckpointError, ConfigError
from lotaqaf_jax.quant import encode_zeros, packed_size
from tests.convert.making import checkpoint

HIDDEN, INTERMEDIATE = 128, 256
SHAPES = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"} | {
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
MODULES = {f"model.layers.0.{name}": shape for name, shape in SHAPES.items()}
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def packed(shape: tuple[int, int], bits: int, group_size: int, zero: int, stored: str) -> dict[str, np.ndarray]:
    """The tensors of a module without act-order, its words 0 and its zero points one number."""
    n_in, n_out = shape
    groups = 1 if group_size == -1 else -(-n_in // group_size)
    return {
        "qweight": np.zeros((packed_size(n_in, bits), n_out), np.int32),
        "qzeros": np.asarray(encode_zeros(np.full((groups, n_out), zero), bits, stored)),
        "scales": np.ones((groups, n_out), np.float16),
        "g_idx": np.arange(n_in, dtype=np.int32) // (n_in if group_size == -1 else group_size),
    }


def gptq(
    path: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    zero: int | None = None,
    modules: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    without: tuple[str, ...] = (),
    ranks: dict[str, int] | None = None,
    exact: bool = False,
    **config: Any,
) -> Path:
    """A Llama of one layer in GPTQ.

    Args:
        path: the folder.
        bits: width.
        group_size: rows of a group.
        zero: every true zero point; None for the middle.
        modules: other shapes, or what else :func:`packed` takes, or None for a module in 16 bit.
        tensors: more tensors, or None for those to leave out.
        without: keys to leave out of the quantisation config.
        ranks: of a LoRA in offset_adapter/.
        exact: whether mu itself lies beside it.
        config: more of the quantisation config.
    """
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": True, "desc_act": False}
    quantization |= {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.6.0"]}} | config
    stored = quantization["checkpoint_format"]
    held = {"model.embed_tokens.weight": np.zeros((8, HIDDEN), np.float16)}
    held |= {"model.norm.weight": np.zeros(HIDDEN, np.float16), "lm_head.weight": np.zeros((8, HIDDEN), np.float16)}
    for name, shape in (MODULES | (modules or {})).items():
        form = {"shape": MODULES.get(name, shape), "bits": bits, "group_size": group_size, "stored": stored}
        if shape is None:
            held[f"{name}.weight"] = np.zeros(MODULES[name][::-1], np.float16)
            continue
        form |= shape if isinstance(shape, dict) else {"shape": shape}
        form.setdefault("zero", 2 ** (form["bits"] - 1) if zero is None else zero)
        held |= {f"{name}.{part}": tensor for part, tensor in packed(**form).items()}
    for name, tensor in (tensors or {}).items():
        held.pop(name, None)
        held |= {} if tensor is None else {name: tensor}
    quantization = {key: value for key, value in quantization.items() if key not in without}
    write(path, held, quantization_config=quantization)
    if ranks is not None:
        (path / OFFSET_FOLDER).mkdir()
        form = lora_config(ranks, ranks, (), str(path))
        (path / OFFSET_FOLDER / ADAPTER_CONFIG).write_text(json.dumps(form))
        lora = {f"{PREFIX}{name}.lora_A.weight": np.zeros((rank, 4), np.float32) for name, rank in ranks.items()}
        save_file(lora, path / OFFSET_FOLDER / ADAPTER_WEIGHTS)
        if exact:
            save_file({f"{Q}.offset": np.zeros((4, 4), np.float32)}, path / OFFSET_FOLDER / OFFSET_FILE)
    return path


def write(path: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    base = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "dtype": "float16"}
    (path / "config.json").write_text(json.dumps(base | config))
    return path


def dense(path: Path, **more: np.ndarray) -> Path:
    tensors = {f"{name}.weight": np.zeros(shape[::-1], np.float16) for name, shape in MODULES.items()}
    return write(path, tensors | more)


def awq(path: Path, *, rows: int = INTERMEDIATE, without: str = "", more: str = "", **config: Any) -> Path:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"} | config
    tensors = {
        f"{DOWN}.qweight": np.zeros((rows, HIDDEN // 8), np.int32),
        f"{DOWN}.qzeros": np.zeros((rows // 32, HIDDEN // 8), np.int32),
        f"{DOWN}.scales": np.ones((rows // 32, HIDDEN), np.float16),
    }
    tensors |= {more: np.zeros(4)} if more else {}
    return write(path, tensors, quantization_config={k: v for k, v in quantization.items() if k != without})


def mlx(path: Path, *, bits: int = 4, group_size: int = 64, **more: np.ndarray) -> Path:
    """As mlx-lm writes it: the grid under both names."""
    grid = {"bits": bits, "group_size": group_size}
    tensors = {f"{DOWN}.weight": np.zeros((HIDDEN, INTERMEDIATE * bits // 32), np.uint32)}
    tensors |= {f"{DOWN}.{name}": np.zeros((HIDDEN, 4), np.float32) for name in ("scales", "biases")}
    return write(path, tensors | more, quantization=grid, quantization_config=grid)


def compressed(path: Path, actorder: Any, name: str = f"{DOWN}.weight_packed") -> Path:
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "actorder": actorder}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    return write(path, {name: np.zeros((HIDDEN, 32), np.int32)}, quantization_config=config)


def gguf(path: Path, start: bytes = b"GGUF\x03\0\0\0") -> Path:
    path.mkdir()
    (path / "model.gguf").write_bytes(start + bytes(16))
    return path


def onnx(path: Path, named: str = "model.onnx") -> Path:
    """As onnxruntime-genai loads it."""
    path.mkdir()
    (path / "model.onnx").write_bytes(b"")
    (path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": named}}}))
    return path


def scattered(n_in: int = HIDDEN) -> np.ndarray:
    return (np.arange(n_in, dtype=np.int32) // 32)[::-1].copy()


HEAD = {"lm_head": (HIDDEN, 64)}
NO_HEAD: dict[str, Any] = {"lm_head.weight": None}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_symmetric_gptq_loads_wherever_gptq_does(bits: int, group_size: int, tmp_path: Path) -> None:
    folder = gptq(tmp_path / "model", bits=bits, group_size=group_size)
    loads = {name for name in convert.RUNTIMES if convert.check_runtime(folder, name).loads}
    assert loads == {"vllm", "sglang", "transformers", "gptqmodel"}


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "vllm keys": ("vllm", {"without": ("sym", "desc_act")}, "has no desc_act, sym"),
    "vllm planes": ("vllm", {"checkpoint_format": "gptq_p"}, "gptq_p"),
    "vllm width": ("vllm", {"bits": 3}, "3 bit; GPTQ is taken with 4 or 8 bit"),
    "vllm asymmetric": ("vllm", {"sym": False, "zero": 5}, "sym is false"),
    "vllm zeros": ("vllm", {"zero": 5}, "zero points other than 8"),
    "vllm act-order": ("vllm", {"desc_act": True, "tensors": {f"{Q}.g_idx": scattered()}}, "act-order is not loaded."),
    "vllm g_idx": ("vllm", {"tensors": {f"{Q}.g_idx": scattered()}}, "g_idx is not i // group_size"),
    "vllm groups": ("vllm", {"group_size": 16}, "group_size 16; expected one of -1, 32, 64, 128"),
    "vllm partial": ("vllm", {"modules": {DOWN: (144, HIDDEN)}}, "144 inputs in groups of 32 leave a partial"),
    "vllm words": ("vllm", {"modules": {DOWN: (INTERMEDIATE, 100)}}, "do not fill whole 32-bit words"),
    "vllm parts": ("vllm", {"modules": {Q: None}, "dynamic": {f"-:{Q}": {}}}, "not quantised alike"),
    "vllm head": ("vllm", {"modules": HEAD, "tensors": NO_HEAD}, "lacks lm_head: true"),
    "vllm tensor": ("vllm", {"tensors": {f"{Q}.offset": np.zeros(4)}}, f"{Q}.offset: no parameter of the model"),
    "vllm layer": ("vllm", {"tensors": {"model.layers.1.mlp.up_proj.weight": np.zeros(4)}}, "no parameter of the"),
    "vllm rank": ("vllm", {"ranks": {Q: 4, DOWN: 513}}, "rank 513, above 512"),
    "sglang keys": ("sglang", {"without": ("desc_act",)}, "has no desc_act"),
    "sglang planes": ("sglang", {"checkpoint_format": "gptq_p"}, "gptq_p"),
    "sglang zeros": ("sglang", {"zero": 5}, "zero points other than 8"),
    "sglang v2": ("sglang", {"sym": False, "zero": 5, "checkpoint_format": "gptq_v2"}, "off by one step"),
    "sglang zero of 0": ("sglang", {"sym": False, "zero": 0}, "a borrow from the next field"),
    "sglang g_idx": ("sglang", {"tensors": {f"{Q}.g_idx": scattered()}}, "g_idx is not i // group_size"),
    "sglang partial": ("sglang", {"modules": {DOWN: (144, HIDDEN)}}, "144 inputs in groups of 32"),
    "sglang words": ("sglang", {"modules": {DOWN: (INTERMEDIATE, 100)}}, "do not fill whole 32-bit words"),
    "sglang dynamic": (
        "sglang",
        {"modules": {Q: {"bits": 8}}, "dynamic": {f"+:{Q}": {"bits": 8}}},
        "as the quantisation config says of model.layers.0.self_attn.qkv_proj",
    ),
    "sglang 16 bit": ("sglang", {"modules": {DOWN: None}}, "is in 16 bit, but is loaded as 4 bit"),
    "sglang head": ("sglang", {"modules": HEAD, "tensors": NO_HEAD}, "lacks lm_head: true"),
    "sglang rank": ("sglang", {"ranks": {Q: 4, DOWN: 8}}, f"offset_adapter/: {Q} is of rank 4, not of r = 8"),
    "sglang more files": (
        "sglang",
        {"ranks": {Q: 4, DOWN: 4}, "exact": True},
        "lota_offset.safetensors is read as part",
    ),
    "transformers planes": ("transformers", {"checkpoint_format": "gptq_p"}, "gptq_p"),
    "transformers dynamic": ("transformers", {"dynamic": {"+:.*layers.7.*": {}}}, "`dynamic`"),
    "transformers head": ("transformers", {"modules": HEAD, "tensors": NO_HEAD, "lm_head": True}, "wrong logits"),
    "gptqmodel no meta": ("gptqmodel", {"sym": False, "zero": 5, "without": ("meta",)}, "meta.quantizer is missing"),
    "gptqmodel old": (
        "gptqmodel",
        {"sym": False, "zero": 5, "meta": {"quantizer": ["gptqmodel:0.8.1", "gptqmodel:7.6.0"]}},
        "expected gptqmodel:0.9.0",
    ),
    "mlx": ("mlx", {}, "g_idx is refused"),
    "llama.cpp": ("llama.cpp", {}, "a .gguf file is loaded, nothing else"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_gptq_rule(case: str, tmp_path: Path) -> None:
    runtime, damage, sentence = BROKEN[case]
    stored = damage.get("checkpoint_format")
    folder = gptq(tmp_path / "model", **({**damage, "checkpoint_format": "gptq"} if stored == "gptq_p" else damage))
    if stored == "gptq_p":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["checkpoint_format"] = stored
        (folder / "config.json").write_text(json.dumps(config))
    verdict = convert.check_runtime(folder, runtime)
    assert not verdict.loads
    assert sentence in " ".join(verdict.reasons)
    # Layers of other widths are also not alike; nothing else breaks two rules.
    assert len(verdict.reasons) == (2 if case == "sglang dynamic" else 1), verdict.reasons


@pytest.mark.parametrize("bits", [2, 3])
def test_sglang_loads_other_widths_symmetric_or_not(bits: int, tmp_path: Path) -> None:
    assert convert.check_runtime(gptq(tmp_path / "sym", bits=bits), "sglang").loads
    asymmetric = gptq(tmp_path / "asym", bits=bits, sym=False, zero=3)
    assert convert.check_runtime(asymmetric, "sglang").loads
    assert not convert.check_runtime(asymmetric, "vllm").loads


def test_sglang_judges_dynamic_by_its_kernel(tmp_path: Path) -> None:
    """A config that takes Marlin holds for every module: no width and no group size that Marlin lacks."""
    for key, value, sentence in (("bits", 3, "4 or 8 bit"), ("group_size", 16, "group_size 16")):
        changed = {"modules": {DOWN: {key: value}}, "dynamic": {f"+:{DOWN}": {key: value}}}
        marlin = convert.check_runtime(gptq(tmp_path / f"{key}-sym", **changed), "sglang")
        assert [sentence in reason for reason in marlin.reasons] == [True]
        assert convert.check_runtime(gptq(tmp_path / f"{key}-asym", sym=False, zero=5, **changed), "sglang").loads


def test_transformers_looks_into_config_json_alone(tmp_path: Path) -> None:
    for folder in (gptq(tmp_path / "gptq"), awq(tmp_path / "awq")):
        config = json.loads((folder / "config.json").read_text())
        (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
        (folder / "config.json").write_text(json.dumps(config))
        assert ["copy it there" in reason for reason in convert.check_runtime(folder, "transformers").reasons] == [True]
        assert convert.check_runtime(folder, "vllm").loads


OTHERS: dict[str, tuple[str, Callable[[Path], Path], str | None]] = {
    "awq on vllm": ("vllm", awq, None),
    "awq on sglang": ("sglang", awq, None),
    "awq on mlx": ("mlx", awq, None),
    "awq group on mlx": ("mlx", lambda path: awq(path, group_size=16), "group_size is 16"),
    "awq width on mlx": ("mlx", lambda path: awq(path, bits=8), "only 4 bit"),
    "awq version on mlx": ("mlx", lambda path: awq(path, version="gemv"), "read as gemm's"),
    "awq tensor on mlx": ("mlx", lambda path: awq(path, more="mu"), "mu: no parameter of the model"),
    "awq tensor": ("vllm", lambda path: awq(path, more="mu"), "mu: no parameter of the model"),
    "awq on transformers": ("transformers", awq, None),
    "awq width on transformers": ("transformers", lambda path: awq(path, bits=8), "only 4 bit"),
    "awq head on transformers": ("transformers", lambda path: awq(path, more="lm_head.scales"), "wrong logits"),
    "awq on gptqmodel": ("gptqmodel", awq, None),
    "awq width on gptqmodel": ("gptqmodel", lambda path: awq(path, bits=8), "only 4 bit"),
    "mlx on mlx": ("mlx", mlx, None),
    "mlx width": ("mlx", lambda path: mlx(path, bits=7), "bits is 7"),
    "mlx group": ("mlx", lambda path: mlx(path, group_size=16), "group_size is 16"),
    "mlx tensor": ("mlx", lambda path: mlx(path, **{f"{DOWN}.g_idx": np.zeros(4)}), "no parameter of the model"),
    "mlx on vllm": ("vllm", mlx, "MLX folders are not loaded"),
    "mlx on transformers": ("transformers", mlx, "MLX folders are not loaded"),
    "16 bit on mlx": ("mlx", dense, None),
    "16 bit with a tensor more on mlx": ("mlx", lambda path: dense(path, mu=np.zeros(4)), "mu: no parameter"),
    "16 bit on vllm": ("vllm", dense, None),
    "16 bit on transformers": ("transformers", dense, None),
    "16 bit on gptqmodel": ("gptqmodel", dense, "16-bit folders are not loaded"),
    "16 bit on llama.cpp": ("llama.cpp", dense, "convert_hf_to_gguf.py"),
    "16 bit with a tensor more": ("vllm", lambda path: dense(path, mu=np.zeros(4)), "mu: no parameter of the model"),
    "gguf on llama.cpp": ("llama.cpp", gguf, None),
    "gguf on transformers": ("transformers", gguf, None),
    "gguf on vllm": ("vllm", gguf, "vllm-gguf-plugin"),
    "gguf on sglang": ("sglang", gguf, None),
    "no gguf on sglang": ("sglang", lambda path: gguf(path, b"GGML\x03\0\0\0"), "does not begin as a GGUF file"),
    "no gguf on transformers": ("transformers", lambda path: gguf(path, b"GGML\x03\0\0\0"), "does not begin as"),
    "gguf of version 1": ("llama.cpp", lambda path: gguf(path, b"GGUF\x01\0\0\0"), "does not begin as a GGUF file"),
    "onnx on onnxruntime": ("onnxruntime", onnx, None),
    "onnx on transformers": ("transformers", onnx, "ONNX folders are not loaded"),
    "16 bit on onnxruntime": ("onnxruntime", dense, "16-bit folders are not loaded"),
    "compressed-tensors on vllm": ("vllm", lambda path: compressed(path, "static"), None),
    "compressed-tensors in act-order": ("vllm", lambda path: compressed(path, "group"), "actorder is 'group'"),
    "compressed-tensors tensor": ("vllm", lambda path: compressed(path, None, "mu"), "mu: no parameter of the model"),
    "compressed-tensors on mlx": ("mlx", lambda path: compressed(path, None), "not judged here"),
}


OTHERS |= {
    f"awq {what} on {runtime}": (runtime, make, sentence)
    for runtime in ("vllm", "sglang")
    for what, make, sentence in (
        ("keys", lambda path: awq(path, without="zero_point"), "has no zero_point"),
        ("spelled otherwise", lambda path: awq(path, without="bits", w_bit=4), None),
        ("width", lambda path: awq(path, bits=8), "only 4 bit"),
        ("version", lambda path: awq(path, version="gemv"), "read as gemm's"),
        ("group", lambda path: awq(path, group_size=16), "group_size 16; expected one of -1, 32, 64, 128"),
        ("partial", lambda path: awq(path, rows=272), "272 inputs in groups of 32"),
    )
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_formats(case: str, tmp_path: Path) -> None:
    runtime, make, sentence = OTHERS[case]
    verdict = convert.check_runtime(make(tmp_path / "model"), runtime)
    assert verdict.loads == (sentence is None), verdict.reasons
    assert len(verdict.reasons) == (0 if sentence is None else 1)
    assert sentence is None or sentence in verdict.reasons[0]
    assert verdict.targets == ()  # only GPTQ folders are exported


@pytest.mark.parametrize(("rank", "step"), [(1, 1), (2, 8), (172, 256), (320, 320), (344, 512), (512, 512)])
def test_vllm_is_told_the_step_that_holds_the_lora(rank: int, step: int, tmp_path: Path) -> None:
    verdict = convert.check_runtime(gptq(tmp_path / "model", ranks={Q: 1, DOWN: rank}), "vllm")
    assert verdict.loads
    assert f"--enable-lora --max-lora-rank {step} --lora-modules mu=" in verdict.notes[0]


def test_notes_name_what_is_needed(tmp_path: Path) -> None:
    bf16 = gptq(tmp_path / "model", sym=False, zero=5, ranks={Q: 4, DOWN: 4})
    config = json.loads((bf16 / "config.json").read_text()) | {"dtype": "bfloat16"}
    (bf16 / "config.json").write_text(json.dumps(config))
    notes = {name: " ".join(convert.check_runtime(bf16, name).notes) for name in convert.RUNTIMES}
    assert "--dtype float16" in notes["sglang"]
    assert "--max-lora-rank 4" in notes["sglang"]
    assert "PeftModel.from_pretrained" in notes["transformers"]
    assert "Lora(rank=4" in notes["gptqmodel"]
    assert notes["vllm"] == ""
    small = gptq(tmp_path / "small", modules={DOWN: (64, 32)})
    assert "--quantization gptq --dtype float16" in convert.check_runtime(small, "sglang").notes[0]


TARGETS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "symmetric": (
        {},
        {"vllm": "gptq gptq8 awq hf16", "mlx": "awq mlx hf16", "llama.cpp": "gguf", "onnxruntime": "onnx"},
    ),
    "asymmetric": ({"sym": False, "zero": 5}, {"vllm": "gptq8 awq hf16", "gptqmodel": "gptq gptq8 awq"}),
    # mu leaves no place for AWQ's integer zero points; the LoRA helps where the GPTQ folder loads.
    "asymmetric with mu": (
        {"sym": False, "zero": 5, "ranks": {Q: 4, DOWN: 8}, "exact": True},
        {
            "vllm": "gptq8 hf16",
            "mlx": "mlx hf16",
            "transformers": "gptq gptq8 peft gguf hf16",
            "sglang": "gptq8 peft gguf hf16",
        },
    ),
    "act-order": (
        {"desc_act": True, "tensors": {f"{Q}.g_idx": scattered()}},
        {"vllm": "hf16", "sglang": "gptq gptq8 hf16", "mlx": "hf16", "llama.cpp": "", "onnxruntime": "onnx"},
    ),
    "8 bit": ({"bits": 8}, {"vllm": "gptq hf16", "mlx": "mlx hf16", "llama.cpp": ""}),
    "groups of 16": ({"group_size": 16}, {"vllm": "hf16", "mlx": "hf16", "llama.cpp": "", "onnxruntime": "onnx"}),
    "groups of 8": ({"group_size": 8}, {"vllm": "hf16", "onnxruntime": ""}),
    "one group": ({"group_size": -1}, {"vllm": "gptq gptq8 hf16", "mlx": "hf16", "llama.cpp": "gguf"}),
    "a group left over": ({"modules": {DOWN: (144, HIDDEN)}}, {"vllm": "hf16", "mlx": "hf16", "llama.cpp": ""}),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_load_instead(case: str, tmp_path: Path) -> None:
    model, expected = TARGETS[case]
    folder = gptq(tmp_path / "model", **model)
    assert {name: " ".join(convert.check_runtime(folder, name).targets) for name in expected} == expected


def test_a_flag_that_is_wrong_in_the_config_is_named(tmp_path: Path) -> None:
    centred = convert.check_runtime(gptq(tmp_path / "centred", sym=False), "vllm")
    assert "set sym to true" in centred.reasons[0]
    in_order = convert.check_runtime(gptq(tmp_path / "in_order", desc_act=True), "vllm")
    assert "set desc_act to false" in in_order.reasons[0]
    assert convert.check_runtime(gptq(tmp_path / "one", desc_act=True, group_size=-1), "vllm").loads


def test_zero_points_decide_over_the_config_in_real_files(tmp_path: Path) -> None:
    """Of a file by GPTQModel: asymmetric, called symmetric by a careless hand."""
    source = checkpoint("ckpt-llamapos-b4g32-asym")
    assert source is not None
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    for name in ("config.json", "quantize_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"sym": false', '"sym": true'))
    assert "zero points other than 8" in convert.check_runtime(folder, "vllm").reasons[0]
    assert convert.check_runtime(checkpoint("ckpt-llama-b4g32-sym-dynamic") or "", "vllm").loads


def test_several_shards_are_read(shared: Path) -> None:
    folder = shared / "checkpoints" / "format" / "ckpt-sharded-llama-b4g32-sym"
    assert convert.check_runtime(folder, "vllm").loads


def test_a_gguf_file_beside_safetensors_is_llama_cpps(tmp_path: Path) -> None:
    folder = gptq(tmp_path / "model")
    (folder / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert convert.check_runtime(folder, "llama.cpp").loads
    assert convert.check_runtime(folder, "vllm").loads


def test_other_architectures_are_judged_but_for_their_names(tmp_path: Path) -> None:
    folder = gptq(tmp_path / "model", tensors={"model.extra.weight": np.zeros(4)})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["PhiForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    verdict = convert.check_runtime(folder, "vllm")
    assert verdict.loads
    assert "names of its tensors were not checked" in verdict.notes[0]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = gptq(tmp_path / "good"), gptq(tmp_path / "bad", bits=3, sym=False, zero=5)
    assert main(["check", "--runtime", "vllm", str(good)]) == 0
    assert capsys.readouterr().out.startswith(f"vllm 0.33.0 loads {good}: yes\n")
    assert main(["check", "--runtime", "vllm", str(bad)]) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("bad: no")
    assert ["3 bit" in out[1], "sym is false" in out[2]] == [True, True]
    assert out[-1] == "export targets that load: gptq8, hf16"
    assert main(["check", "--runtime", "toaster", str(good)]) == 2
    assert "expected one of vllm, sglang" in capsys.readouterr().err


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        convert.check_runtime(tmp_path / "nowhere", "vllm")
    with pytest.raises(CheckpointError, match=r"neither .safetensors nor .gguf"):
        convert.check_runtime(tmp_path, "vllm")
    with pytest.raises(CheckpointError, match=r"genai_config.json: found 'decoder.onnx' as model.decoder.filename"):
        convert.check_runtime(onnx(tmp_path / "onnx", named="decoder.onnx"), "onnxruntime")
    folder = gptq(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="header cannot be read"):
        convert.check_runtime(folder, "vllm")
    with pytest.raises(ConfigError, match="expected one of vllm"):
        convert.check_runtime(folder, "vLLM")


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gptq(tmp_path / "model")
    assert any(name.endswith("qweight") for name in load_file(folder / "model.safetensors"))
    read: list[str] = []
    original = convert.runtimes.folder.CheckpointFolder.read
    monkeypatch.setattr(
        convert.runtimes.folder.CheckpointFolder,
        "read",
        lambda self, name: (read.append(name), original(self, name))[1],
    )
    convert.check_runtime(folder, "vllm")
    assert {name.rpartition(".")[2] for name in read} == {"qzeros", "g_idx"}
