"""What we write, opened by the client software: every folder is made first, then the client reads them all at once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import lotaqaf_jax
from lotaqaf_jax.models import DecoderConfig, init_decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import adapter_model, checkpoint

CLIENT = Path(__file__).parent / "client.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """A base and how it is adapted; ``gptqmodel_only`` where transformers is known not to load the base itself."""

    base: str
    bits: int
    offset: str
    targets: tuple[str, ...] = ()
    gptqmodel_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.base}-{self.offset}" + ("-some" if self.targets else "")


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
)


# 16-bit models quantised here: (name, model type, settings). v1 with zero points of their own is read by GPTQModel only
# because of what `meta.quantizer` says.
QUANTIZED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("quantized-llama-b4g32-asym", "llama", {"bits": 4}),
    ("quantized-llama-b3g32-asym-v1", "llama", {"bits": 3, "checkpoint_format": "gptq"}),
    ("quantized-qwen2-b4g32-asym-v1", "qwen2", {"bits": 4, "checkpoint_format": "gptq"}),
    ("quantized-qwen2-b2g32-sym-desc", "qwen2", {"bits": 2, "sym": True, "desc_act": True}),
    ("quantized-llama-b8g64-asym-partial", "llama", {"bits": 8, "group_size": 64}),
)
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@dataclasses.dataclass(frozen=True)
class Opened:
    """Our logits and the client's, by what was opened: "base" and "merged", by "transformers" and "gptqmodel"."""

    ours: dict[str, np.ndarray]
    theirs: dict[tuple[str, str], np.ndarray | str]


def with_tokenizer(base: Path, folder: Path) -> Path:
    """A copy of a base; one without a tokenizer gets that of the tiny models, since GPTQModel does not load without."""
    if not folder.is_dir():
        shutil.copytree(base, folder)
        if not (folder / "tokenizer.json").is_file():
            tokenizer = checkpoint("tokenizer")
            assert tokenizer is not None
            shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def client_python() -> str:
    python = os.environ.get("LOTAQAF_INTEROP_PYTHON")
    if not python:
        pytest.fail("LOTAQAF_INTEROP_PYTHON is not set; `make interop` sets it to the environment that it makes")
    return python


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory, client_python: str) -> dict[str, Opened]:
    root = tmp_path_factory.mktemp("interop")
    jobs: list[dict[str, object]] = []
    ours: dict[str, dict[str, np.ndarray]] = {}
    keys: dict[str, tuple[str, str, str]] = {}

    def ask(case: str, what: str, bits: int, folder: Path, ids: Path, kinds: tuple[str, ...]) -> None:
        for kind in kinds:
            output = root / f"{case}.{what}.{kind}.npy"
            beside = folder / "offset_adapter"
            adapter = str(beside) if beside.is_dir() else None
            job = {"kind": kind, "folder": str(folder), "adapter": adapter, "bits": bits}
            jobs.append(job | {"input_ids": str(ids), "output": str(output)})
            keys[str(output)] = (case, what, kind)

    asked: set[str] = set()
    for case in CASES:
        source = checkpoint(case.base)
        if source is None:
            continue
        path = with_tokenizer(source, root / "bases" / case.base)
        kinds = ("gptqmodel",) if case.gptqmodel_only else ("transformers", "gptqmodel")
        base = CheckpointFolder(path)
        model = adapter_model(base, offset=case.offset, targets=case.targets or None)
        ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)
        np.save(root / f"{case.name}.ids.npy", ids)
        convert.merge_and_save(model, root / case.name, base=base, progress=False)
        plain = lotaqaf_jax.load_pretrained(path, progress=False)
        ours[case.name] = {"base": np.asarray(plain(ids)), "merged": np.asarray(model(ids))}
        if case.base not in asked:
            ask(case.base, "base", case.bits, path, root / f"{case.name}.ids.npy", kinds)
            asked.add(case.base)
        ask(case.name, "merged", case.bits, root / case.name, root / f"{case.name}.ids.npy", kinds)

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

    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [client_python, str(CLIENT), str(root / "jobs.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    failed = json.loads((root / "jobs.json.failed").read_text())
    theirs: dict[str, dict[tuple[str, str], np.ndarray | str]] = {}
    for output, (case_name, what, kind) in keys.items():
        result = failed[output] if output in failed else np.load(output)
        theirs.setdefault(case_name, {})[what, kind] = result
    of_base = {case.name: theirs.get(case.base, {}) for case in CASES}
    return {name: Opened(ours[name], of_base.get(name, {}) | theirs[name]) for name in ours}
