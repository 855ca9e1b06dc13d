"""What we write, opened by the client software: every folder is made first, then the client reads them all at once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import convert
import lotaqaf_jax
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
