"""The card of an exported folder, README.md: what it is, how it was made, what was measured, and how to load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from convert.offset import OFFSET_FOLDER
from convert.runtimes import RUNTIMES, ModelFolder, judged, read_folder
from lotaqaf_jax import __version__
from lotaqaf_jax.errors import LotaError
from lotaqaf_jax.parallel.processes import is_main

__all__ = ["CARD", "CardFacts", "loading_lines", "write_card"]

CARD = "README.md"
_TITLES = {
    "transformers": "transformers",
    "gptqmodel": "GPTQModel",
    "mlx": "mlx-lm",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
    "onnxruntime": "onnxruntime-genai",
}


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card tells and the folder does not.

    Attributes:
        name: of the folder, once it is in its place.
        base: of the model that was fine-tuned.
        target: title of the format.
        training: lines on method, settings and data; none where they are not known.
        figures: lines on what was measured.
    """

    name: str
    base: str
    target: str
    training: Sequence[str]
    figures: Sequence[str]


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into a folder that is complete but for it.

    Args:
        folder: where the files are.
        facts: the rest.
    """
    if is_main():
        (folder / CARD).write_text(_text(folder, facts), encoding="utf-8")


def _text(folder: Path, facts: CardFacts) -> str:
    training = "\n".join(f"    {line}" for line in facts.training) or "Not known to the program that wrote this folder."
    measured = "\n".join(f"    {line}" for line in facts.figures)
    return f"""---
base_model: {facts.base}
tags:
- lota-qaf
- {facts.target.split(",")[0].split()[0].lower()}
---
# {facts.name}

{facts.base}, fine-tuned, in the format {facts.target}; written by lotaqaf_jax {__version__}. What was trained lies
in the integers of the weights, which moved by at most one step of their grid, and in the offset, if there is one.

## Training

{training}

## Measured

{measured}

## Loading

{_loading(folder, facts)}"""


def _loading(folder: Path, facts: CardFacts) -> str:
    if (folder / "adapter_config.json").is_file():
        on_top = ["from peft import PeftModel", f'model = PeftModel.from_pretrained(model, "{facts.name}")']
        return f"On the GPTQ folder that belongs to it, loaded by transformers:\n\n{_python(on_top)}"
    try:
        found = read_folder(folder)
    except LotaError as problem:
        parts = [f"**{_TITLES.get(runtime, runtime)}**: not known. {problem}\n" for runtime in RUNTIMES]
    else:
        parts = [_part(found, runtime, facts.name) for runtime in RUNTIMES]
    # The folder is judged where it is being written.
    return "\n".join(parts).replace(str(folder), facts.name).replace(folder.name, facts.name)


def _part(found: ModelFolder, runtime: str, name: str) -> str:
    verdict = judged(found, runtime)
    title = f"**{_TITLES.get(runtime, runtime)}** {verdict.version}:"
    lines = loading_lines(found, runtime, name) if verdict.loads else ""
    if not lines:
        return f"{title} no. {' '.join(verdict.reasons)}\n"
    notes = "".join(f"\n{note}\n" for note in verdict.notes)
    return f"{title}\n\n{lines}{notes}"


def loading_lines(found: ModelFolder, runtime: str, name: str) -> str:
    """Markdown with the lines by which a runtime loads a folder; "" where there are none.

    Args:
        found: the folder.
        runtime: one of :data:`convert.RUNTIMES`, which loads it.
        name: what the lines call the folder.
    """
    kind = found.kind
    offset = f"{name}/{OFFSET_FOLDER}" if (found.path / OFFSET_FOLDER).is_dir() else None
    if runtime == "transformers":
        return _python(_transformers(kind, found.quantization.get("bits"), name, offset))
    if runtime == "gptqmodel":
        return _python(_gptqmodel(kind, name, offset))
    if runtime == "mlx":
        return _python(["from mlx_lm import load", f'model, tokenizer = load("{name}")'])
    if runtime == "vllm":
        lora = f" --enable-lora --lora-modules offset={offset}" if offset else ""
        return _shell(f"vllm serve {name}{lora}")
    if runtime == "sglang":
        return _shell(f"python -m sglang.launch_server --model-path {name}")
    if runtime == "onnxruntime":
        return _python(_genai(name))
    if runtime == "llama.cpp" and kind == "gguf":
        return _shell(f"llama-cli -m {name}/model.gguf")
    return ""


def _transformers(kind: str, bits: int | None, name: str, offset: str | None) -> list[str]:
    # The exact kernel, on any device; without the argument the fastest there is.
    how = {
        "gptq": ("GPTQConfig", f'bits={bits}, backend="gptq_torch"'),
        "awq": ("AwqConfig", f'bits={bits}, backend="torch_awq"'),
        # Dequantised on loading; packed, it refuses asymmetric folders.
        "compressed-tensors": ("CompressedTensorsConfig", "run_compressed=False"),
    }.get(kind)
    imports, more = "AutoModelForCausalLM", ""
    if how is not None:
        imports += f", {how[0]}"
        more = f", quantization_config={how[0]}({how[1]})"
    elif kind == "gguf":
        # Without config.json it leaves out rope factors and Llama's biases.
        imports = f"AutoConfig, {imports}"
        more = f', gguf_file="model.gguf", config=AutoConfig.from_pretrained("{name}")'
    lines = [f"from transformers import {imports}", f'model = AutoModelForCausalLM.from_pretrained("{name}"{more})']
    if offset:
        lines = ["from peft import PeftModel", *lines, f'model = PeftModel.from_pretrained(model, "{offset}")']
    return lines


def _gptqmodel(kind: str, name: str, offset: str | None) -> list[str]:
    backend = "BACKEND.AWQ_TORCH" if kind == "awq" else "BACKEND.GPTQ_TORCH"
    lines = ["from gptqmodel import BACKEND, GPTQModel"]
    more = ""
    if offset:
        lines.append("from gptqmodel.adapter.adapter import Lora")
        more = f', adapter=Lora(rank=None, path="{offset}")'
    return [*lines, f'model = GPTQModel.load("{name}", backend={backend}{more})']


def _genai(name: str) -> list[str]:
    return [
        "import onnxruntime_genai as og",
        "from transformers import AutoTokenizer",
        f'model = og.Model("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "params = og.GeneratorParams(model)",
        "params.set_search_options(max_length=64)",
        "generator = og.Generator(model, params)",
        'generator.append_tokens(tokenizer.encode("Once upon a time"))',
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)))",
    ]


def _python(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```", ""])


def _shell(line: str) -> str:
    return f"```shell\n{line}\n```\n"
