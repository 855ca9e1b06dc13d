"""What we write, opened by the client software: every folder is made first, then the client reads them all at once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import lotaqaf_jax
from lotaqaf_jax.models import TARGET_MODULES, Decoder, DecoderConfig, init_decoder, merge
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import checkpoint
from tests.interop.training import trained
from tests.peer import torch_model

CLIENT = Path(__file__).parent / "client.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """A base and how it is adapted: by LoTA-QAF with the rule ``offset``, or by another method, which ``offset`` names.

    ``gptqmodel_only`` where transformers is known not to load the base itself. A ``dense`` base is dequantised first.
    ``lora_alpha`` is of the other methods, whose rank is 8; GPTQModel's own loader leaves a LoRA's alpha / rank out.
    ``one_rank`` where mu is beside as target peft writes it.
    """

    base: str
    bits: int
    offset: str
    targets: tuple[str, ...] = ()
    gptqmodel_only: bool = False
    dense: bool = False
    lora_alpha: float = 16.0
    one_rank: bool = False

    @property
    def name(self) -> str:
        marks = {"-some": self.targets, "-dense": self.dense, "-alpha8": self.lora_alpha == 8, "-peft": self.one_rank}
        return f"{self.base}-{self.offset}" + "".join(mark for mark, holds in marks.items() if holds)

    @property
    def folder(self) -> str:
        """The base's folder, by which its own logits go."""
        return self.base + ("-dense" if self.dense else "")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The clients that open it."""
        if self.dense:
            return ("dense",)
        if self.offset == "lora" and self.lora_alpha != 8:
            return ("transformers",)
        return ("gptqmodel",) if self.gptqmodel_only else ("transformers", "gptqmodel")


CASES = (
    Case("ckpt-llama-b4g32-asym-desc", 4, "reference"),
    Case("ckpt-llama-b4g32-asym-desc", 4, "none"),
    Case("ckpt-llamapos-b4g32-asym", 4, "paper"),
    Case("ckpt-llamapos-b3g32-asym", 3, "reference"),
    Case("ckpt-qwen2-b4g32-sym-desc", 4, "reference"),
    Case("ckpt-qwen2-b4g32-sym-desc", 4, "reference", ("q_proj", "down_proj")),
    Case("ckpt-qwen2-b8g64-sym-partial", 8, "reference"),
    Case("ckpt-qwen2-b8g64-sym-partial", 8, "none"),
    Case("ckpt-llama-b4g32-sym-dynamic", 4, "reference", gptqmodel_only=True),
    Case("babyllama105-gptq-w2g32-asym", 2, "reference"),
    Case("babyllama105-gptq-w2g32-asym", 2, "none"),
    Case("ckpt-llama-b4g32-asym-desc", 4, "reference", one_rank=True),
    Case("ckpt-qwen2-b8g64-sym-partial", 8, "reference", one_rank=True),
    Case("ckpt-llama-b4g32-asym-desc", 4, "qalora"),
    Case("ckpt-qwen2-b8g64-sym-partial", 8, "qalora"),
    Case("babyllama105-gptq-w2g32-asym", 2, "qalora"),
    Case("ckpt-llama-b4g32-asym-desc", 4, "lora"),
    Case("ckpt-llama-b4g32-asym-desc", 4, "lora", lora_alpha=8.0),
    Case("ckpt-qwen2-b4g32-sym-desc", 4, "lora"),
    Case("babyllama105-gptq-w2g32-asym", 2, "lora"),
    Case("ckpt-llamapos-b4g32-asym", 4, "lora", dense=True),
)


# 16-bit models quantised here: (name, model type, settings). v1 with zero points of their own, the default, is read by
# GPTQModel only because of what `meta.quantizer` says.
QUANTIZED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("quantized-llama-b4g32-asym", "llama", {"bits": 4}),
    ("quantized-llama-b3g32-asym", "llama", {"bits": 3}),
    ("quantized-qwen2-b4g32-asym-v2", "qwen2", {"bits": 4, "checkpoint_format": "gptq_v2"}),
    ("quantized-qwen2-b2g32-sym-desc", "qwen2", {"bits": 2, "sym": True, "desc_act": True}),
    ("quantized-llama-b8g64-asym-partial", "llama", {"bits": 8, "group_size": 64}),
)
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@dataclasses.dataclass(frozen=True)
class Opened:
    """Our logits and the client's, by what was opened: "base" and "merged" (or the base with a LoRA), and by whom:
    "transformers", "gptqmodel" and, for 16-bit models, "dense", which is transformers too."""

    ours: dict[str, np.ndarray]
    theirs: dict[tuple[str, str], np.ndarray | str]


def adapted(case: Case, base: CheckpointFolder) -> Decoder:
    """The base with trained adapters of the case's method."""
    if case.offset == "lora" or case.offset == "qalora":
        return trained(base, case.offset, alpha=case.lora_alpha)
    return trained(base, offset=case.offset, targets=case.targets or TARGET_MODULES)


def with_tokenizer(base: Path, folder: Path) -> Path:
    """A copy of a base; one without a tokenizer gets that of the tiny models, since GPTQModel does not load without."""
    if not folder.is_dir():
        shutil.copytree(base, folder)
        if not (folder / "tokenizer.json").is_file():
            add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Put that of the tiny models into a folder."""
    tokenizer = checkpoint("tokenizer")
    assert tokenizer is not None
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def client_python() -> str:
    python = os.environ.get("LOTAQAF_INTEROP_PYTHON")
    if not python:
        pytest.fail("LOTAQAF_INTEROP_PYTHON is not set; `make interop` sets it to the environment that it makes")
    return python


def run_python(python: str, *arguments: str | Path, cwd: Path) -> str:
    """What the clients' Python prints; a failure has the end of all that it said."""
    run = subprocess.run(
        [python, *map(str, arguments)],
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def run_jobs(python: str, script: Path, jobs: Sequence[Mapping[str, Any]], file: Path) -> dict[str, str]:
    """Let a script here do all jobs, which it finds in ``file``; what those that failed said."""
    file.write_text(json.dumps(jobs))
    run_python(python, script, file, cwd=file.parent)
    failed: dict[str, str] = json.loads(Path(f"{file}.failed").read_text())
    return failed


def run_client(python: str, jobs: Sequence[Mapping[str, Any]], root: Path) -> dict[str, np.ndarray | str]:
    """Let the client do all jobs (see client.py); its logits, or what it said, by the job's output."""
    failed = run_jobs(python, CLIENT, jobs, root / "jobs.json")
    outputs = [str(job["output"]) for job in jobs]
    return {output: failed[output] if output in failed else np.load(output) for output in outputs}


@pytest.fixture(scope="package")
def opened(tmp_path_factory: pytest.TempPathFactory, client_python: str) -> dict[str, Opened]:
    root = tmp_path_factory.mktemp("interop")
    jobs: list[dict[str, object]] = []
    ours: dict[str, dict[str, np.ndarray]] = {}
    keys: dict[str, tuple[str, str, str]] = {}

    def ask(
        case: str,
        what: str,
        bits: int,
        folder: Path,
        ids: Path,
        kinds: tuple[str, ...],
        adapter: Path | None = None,
    ) -> None:
        beside = folder / "offset_adapter" if adapter is None else adapter
        for kind in kinds:
            output = root / f"{case}.{what}.{kind}.npy"
            job = {
                "kind": kind,
                "folder": str(folder),
                "adapter": str(beside) if beside.is_dir() else None,
                "bits": bits,
            }
            jobs.append(job | {"input_ids": str(ids), "output": str(output)})
            keys[str(output)] = (case, what, kind)

    asked: set[str] = set()
    for case in CASES:
        source = checkpoint(case.base)
        if source is None:
            continue
        path = with_tokenizer(source, root / "bases" / case.base)
        if case.dense:
            plain = lotaqaf_jax.load_pretrained(path, progress=False)
            path = root / "bases" / case.folder
            torch_model(plain).half().save_pretrained(path)
            add_tokenizer(path)
        base = CheckpointFolder(path)
        model = adapted(case, base)
        ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)
        np.save(root / f"{case.name}.ids.npy", ids)
        plain = lotaqaf_jax.load_pretrained(path, progress=False)
        ours[case.name] = {"base": np.asarray(plain(ids)), "merged": np.asarray(model(ids))}
        given = (root / f"{case.name}.ids.npy", case.kinds)
        if case.folder not in asked:
            ask(case.folder, "base", case.bits, path, *given)
            asked.add(case.folder)
        if case.offset == "lora":
            convert.save_adapter(model, root / case.name, base=base, progress=False)
            ask(case.name, "merged", case.bits, path, *given, adapter=root / case.name)
        else:
            convert.merge_and_save(model, root / case.name, base=base, progress=False)
            beside = root / f"{case.name}.lora" if case.one_rank else None
            if beside is not None:
                convert.save_pretrained(merge(model), beside, base=base, target="peft", progress=False)
            ask(case.name, "merged", case.bits, root / case.name, *given, adapter=beside)

    # A whole checkpoint of our own making, asymmetric, with the configs that we write.
    path = root / "bases" / "ckpt-llamapos-b4g32-asym"
    model = lotaqaf_jax.load_pretrained(path, progress=False)
    convert.write_checkpoint(model, root / "written", tokenizer_from=path, progress=False)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)
    np.save(root / "written.ids.npy", ids)
    ours["written"] = {"merged": np.asarray(model(ids))}
    ask("written", "merged", 4, root / "written", root / "written.ids.npy", ("transformers", "gptqmodel"))

    for name, model_type, options in QUANTIZED:
        config = DecoderConfig.from_hf({"model_type": model_type, "tie_word_embeddings": model_type == "qwen2"} | SIZES)
        dense = init_decoder(config, jax.random.key(0), dtype=jnp.float16, scale=0.1)
        tokenizer = checkpoint("tokenizer")
        convert.write_checkpoint(dense, root / f"{name}.dense", tokenizer_from=tokenizer, progress=False)
        samples = list(np.random.default_rng(0).integers(0, config.vocab_size, (16, 48), dtype=np.int32))
        settings = {"group_size": 32} | options
        convert.quantize(root / f"{name}.dense", root / name, calibration=samples, progress=False, **settings)
        ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 24), dtype=np.int32)
        np.save(root / f"{name}.ids.npy", ids)
        plain = lotaqaf_jax.load_pretrained(root / f"{name}.dense", dtype=jnp.float32, progress=False)
        ours[name] = {"base": np.asarray(plain(ids))}
        ours[name] |= {"merged": np.asarray(lotaqaf_jax.load_pretrained(root / name, progress=False)(ids))}
        ask(name, "merged", options["bits"], root / name, root / f"{name}.ids.npy", ("transformers", "gptqmodel"))

    results = run_client(client_python, jobs, root)
    theirs: dict[str, dict[tuple[str, str], np.ndarray | str]] = {}
    for output, (case_name, what, kind) in keys.items():
        theirs.setdefault(case_name, {})[what, kind] = results[output]
    of_base = {case.name: theirs.get(case.folder, {}) for case in CASES}
    return {name: Opened(ours[name], of_base.get(name, {}) | theirs[name]) for name in ours}
