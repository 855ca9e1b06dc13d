"""Which runtime loads what: the one table of runtimes, their versions and rules, and the verdict by it.

Source: the loaders of the named versions. GPTQModel, transformers (with optimum and PEFT), mlx-lm, llama.cpp and
onnxruntime-genai were run; vLLM and SGLang, which need a card, were read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from convert.runtimes import rules
from convert.runtimes.exports import EXPORTS, exported
from convert.runtimes.folder import Kind, ModelFolder, read_folder
from convert.runtimes.rules import Rule
from lotaqaf_jax.errors import ConfigError

__all__ = ["RUNTIMES", "Runtime", "Verdict", "check_runtime", "judged"]

_NAMES: dict[Kind, str] = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mlx": "MLX",
    "compressed-tensors": "compressed-tensors",
    "16-bit": "16-bit",
    "gguf": "GGUF",
    "onnx": "ONNX",
}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Software that loads model folders.

    Attributes:
        version: the version whose loader the rules are of.
        evidence: "run" or "read".
        kinds: the formats that it loads, each with the rules that a folder has to keep.
        notes: sentences for whoever loads the folder, such as flags; by format.
        refusals: formats that it does not load, where there is more to say than that.
    """

    version: str
    evidence: str
    kinds: Mapping[Kind, tuple[Rule, ...]]
    notes: Mapping[Kind, tuple[Rule, ...]] = dataclasses.field(default_factory=dict)
    refusals: Mapping[Kind, str] = dataclasses.field(default_factory=dict)

    def reasons(self, folder: ModelFolder) -> tuple[str, ...]:
        """Why the folder does not load, or is not computed right; empty where it is."""
        # What lies beside safetensors files does not matter to anybody but llama.cpp, and the other way round.
        kind: Kind = "gguf" if tuple(self.kinds) == ("gguf",) and folder.gguf else folder.kind
        if kind not in self.kinds:
            method = folder.quantization.get("quant_method", "not named")
            return (self.refusals.get(kind, f"{_NAMES.get(kind, f'quant_method {method}')} folders are not loaded."),)
        return tuple(sentence for rule in self.kinds[kind] for sentence in rule(folder))

    def remarks(self, folder: ModelFolder) -> tuple[str, ...]:
        """What to know when loading the folder."""
        return tuple(sentence for rule in self.notes.get(folder.kind, ()) for sentence in rule(folder))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a runtime loads a folder and computes it right; ``str()`` of it is a page to read.

    Attributes:
        runtime: its name.
        version: the version that the rules are of.
        folder: the folder.
        loads: whether it does.
        reasons: why not, every one.
        notes: what to know when loading it, such as flags; empty where it does not load.
        targets: the export targets of this model whose folders load, this one's format included.
    """

    runtime: str
    version: str
    folder: Path
    loads: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    targets: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.runtime} {self.version} loads {self.folder}: {'yes' if self.loads else 'no'}"]
        lines += [f"  - {sentence}" for sentence in (*self.reasons, *self.notes)]
        lines.append(f"export targets that load: {', '.join(self.targets) or 'none'}")
        return "\n".join(lines)


def _say(sentence: str) -> Rule:
    def note(folder: ModelFolder) -> Iterator[str]:
        yield sentence.format(path=folder.path, gguf=folder.gguf[0].name if folder.gguf else "")

    return note


def _with_lora(sentence: str) -> Rule:
    """A note for a folder with offset_adapter/, without which mu is left out."""

    def note(folder: ModelFolder) -> Iterator[str]:
        if folder.lora_ranks:
            rank, width = folder.lora_rank, rules.lora_width(folder)
            yield sentence.format(path=f"{folder.path}/offset_adapter", rank=rank, width=width)

    return note


def _sglang_kernel(folder: ModelFolder) -> Iterator[str]:
    """Types and shapes of SGLang's two GPTQ kernels."""
    general = not rules.marlin_path(folder)
    if general and (found := folder.config.get("dtype") or folder.config.get("torch_dtype")) != "float16":
        yield f"--dtype float16: config.json says {found or 'nothing'}, and this kernel computes in float16 only."
    if not general and any(module.shape[0] % 128 or module.shape[1] % 64 for module in folder.modules):
        yield (
            "layers with inputs not in 128s or outputs not in 64s: if Marlin refuses them, start with --quantization "
            "gptq --dtype float16."
        )


def _names_unchecked(folder: ModelFolder) -> Iterator[str]:
    if (folder.config.get("architectures") or [None])[0] not in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
        yield "the names of its tensors were not checked: that is done for Llama and Qwen2."


_AWQ = (rules.awq_keys, rules.awq_width, rules.awq_version, rules.groups_of_marlin, rules.whole_groups)
_COMPRESSED = _say("of compressed-tensors only the rule against act-order is known here.")

RUNTIMES: Mapping[str, Runtime] = {
    "vllm": Runtime(
        "0.33.0",
        "read",
        {
            "gptq": (
                rules.gptq_keys("bits", "group_size", "desc_act", "sym"),
                rules.not_planar,
                rules.symmetric_widths,
                rules.ignores_qzeros,
                rules.no_act_order,
                rules.ignores_g_idx,
                rules.groups_of_marlin,
                rules.whole_groups,
                rules.whole_words,
                rules.parts_alike,
                rules.head_not_declared,
                rules.strict_names,
                rules.lora_too_wide,
            ),
            "awq": (*_AWQ, rules.strict_names),
            "compressed-tensors": (rules.compressed_order, rules.strict_names),
            "16-bit": (rules.strict_names,),
        },
        {
            "gptq": (
                _names_unchecked,
                _with_lora(
                    "mu is in offset_adapter/: --enable-lora --max-lora-rank {width} --lora-modules mu={path}, and ask "
                    "for the model mu; without, it is left out in silence."
                ),
            ),
            "awq": (_names_unchecked,),
            "compressed-tensors": (_COMPRESSED,),
            "16-bit": (_names_unchecked,),
        },
        {"gguf": "GGUF is loaded only through the package vllm-gguf-plugin, which is not judged here."},
    ),
    "sglang": Runtime(
        "0.5.23",
        "read",
        {
            "gptq": (
                rules.gptq_keys("bits", "group_size", "desc_act"),
                rules.not_planar,
                rules.on_marlin(rules.symmetric_widths),
                rules.on_marlin(rules.groups_of_marlin),
                rules.on_marlin(rules.ignores_qzeros),
                rules.zeros_plus_one,
                rules.ignores_g_idx,
                rules.whole_groups,
                rules.whole_words,
                rules.parts_alike,
                rules.dynamic_names_parts,
                rules.head_not_declared,
                rules.lora_of_one_rank,
                rules.lora_alone,
            ),
            "awq": _AWQ,
            "16-bit": (),
            "gguf": (rules.gguf_magic,),
        },
        {
            "gptq": (
                _sglang_kernel,
                _with_lora(
                    "mu is in offset_adapter/: --enable-lora --max-lora-rank {rank} --lora-paths mu={path}, and ask "
                    "for mu; without, it is left out in silence."
                ),
            ),
            "gguf": (_say("pass the file, not the folder: --model-path {path}/{gguf}."),),
        },
        {"compressed-tensors": "compressed-tensors folders are not judged here."},
    ),
    "transformers": Runtime(
        "5.23.0",
        "run",
        {
            "gptq": (rules.no_config, rules.not_planar, rules.no_dynamic, rules.head_quantized),
            "awq": (rules.no_config, rules.awq_width, rules.head_quantized),
            "compressed-tensors": (),
            "16-bit": (),
            "gguf": (rules.gguf_magic,),
        },
        {
            "gptq": (
                _say(
                    "needs the packages optimum and gptqmodel; on a CPU its default 4-bit kernel is off by 0.1 in "
                    'logits, and quantization_config=GPTQConfig(bits=..., backend="gptq_torch") is exact.'
                ),
                _with_lora(
                    'mu is in offset_adapter/: PeftModel.from_pretrained(model, "{path}"); without, it is left out in '
                    "silence."
                ),
            ),
            "awq": (_say("needs the packages gptqmodel and accelerate."),),
            "compressed-tensors": (
                _say(
                    "needs the package compressed-tensors, and if asymmetric "
                    "quantization_config=CompressedTensorsConfig(run_compressed=False); nothing more is known here."
                ),
            ),
            "gguf": (
                _say(
                    'needs the package gguf: from_pretrained("{path}", gguf_file="{gguf}", '
                    'config=AutoConfig.from_pretrained("{path}")); without config, rope factors and Llama\'s biases '
                    "are left out in silence."
                ),
            ),
        },
    ),
    "gptqmodel": Runtime(
        "7.6.0",
        "run",
        {"gptq": (rules.gptqmodel_meta,), "awq": (rules.awq_width,)},
        {
            "gptq": (
                _say("on a CPU, backend=BACKEND.GPTQ_TORCH is exact."),
                _with_lora(
                    'mu is in offset_adapter/: GPTQModel.load(..., adapter=Lora(rank={rank}, path="{path}")); without, '
                    "it is left out in silence."
                ),
            ),
        },
    ),
    "mlx": Runtime(
        "0.32.2",
        "run",
        {
            "mlx": (rules.mlx_grid, rules.strict_names),
            "awq": (rules.awq_width, rules.awq_version, rules.mlx_grid, rules.strict_names),
            "16-bit": (rules.strict_names,),
        },
        refusals={
            "gptq": "GPTQ folders are not loaded: g_idx is refused, and without it the words are read as AWQ's.",
            "compressed-tensors": "compressed-tensors folders are not judged here.",
        },
    ),
    "llama.cpp": Runtime(
        "with GGUF v3",
        "run",
        {"gguf": (rules.gguf_magic,)},
        {"gguf": (_say("pass the file, not the folder: -m {path}/{gguf}."),)},
        {
            "gptq": "a .gguf file is loaded, nothing else. What the target gguf cannot hold (act-order, 8 bit) goes "
            "through the target hf16 and llama.cpp's own convert_hf_to_gguf.py.",
            "16-bit": "a .gguf file is loaded, nothing else; llama.cpp's convert_hf_to_gguf.py makes one of it.",
        },
    ),
    "onnxruntime": Runtime(
        "0.18.0",
        "run",
        {"onnx": ()},
        {
            "onnx": (
                _say(
                    "its own og.Tokenizer makes transformers' tokens of the byte-level BPE of Llama 3 and Qwen2; of "
                    "others it made other tokens, or refused them, where transformers' AutoTokenizer is right."
                ),
            ),
        },
    ),
}


def check_runtime(folder: str | Path, runtime: str) -> Verdict:
    """Whether a runtime loads a model folder and computes it right, without loading weights.

    Args:
        folder: GPTQ (with or without ``offset_adapter/``), AWQ, MLX, compressed-tensors, 16 bit, with a ``.gguf``, or
            of onnxruntime-genai.
        runtime: one of ``RUNTIMES``.

    Returns:
        The verdict, with every reason against, and the export targets that load instead. Targets are judged as
        folders that the export of this one would write; there are none for a folder that is not GPTQ.

    Raises:
        ConfigError: an unknown runtime, or a quantisation config that cannot be read.
        CheckpointError: no such folder, or no model in it, or a damaged one.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"--runtime: found {runtime!r}, expected one of {', '.join(RUNTIMES)}.")
    return judged(read_folder(folder), runtime)


def judged(found: ModelFolder, runtime: str) -> Verdict:
    """:func:`check_runtime` of a folder that has been read, for whoever asks of several runtimes."""
    rule = RUNTIMES[runtime]
    reasons = rule.reasons(found)
    written = {target: exported(found, target) for target in EXPORTS}
    return Verdict(
        runtime=runtime,
        version=rule.version,
        folder=found.path,
        loads=not reasons,
        reasons=reasons,
        notes=() if reasons else rule.remarks(found),
        targets=tuple(name for name, made in written.items() if made is not None and not rule.reasons(made)),
    )
