"""What `convert export` writes loads in the software that it is for, and computes there what it computes here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import convert
import train
from lotaqaf_jax.models import Decoder, QuantSpec, merge
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.quant.folder import CheckpointFolder
from tests.convert.making import checkpoint
from tests.convert.targets.gguf_making import changed_tokenizer, config, split
from tests.interop.conftest import SIZES, run_client, run_python, with_tokenizer
from tests.interop.test_clients import TOLERANCE as TOLERANCES
from tests.interop.test_clients import distance
from tests.interop.training import trained
from tests.models.tiny import DecoderConfig, quantized_decoder

# Our own model: a Qwen2 of 4 bits, tied, whose adapters train.py trains. Those of other bases are trained as well.
TRAINED = "trained"
CLIENTS = {
    "gptq8": ("transformers", "gptqmodel"),
    "awq": ("awq", "awq-gptqmodel"),
    "mlx": ("mlx",),
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnx-genai"),
    "hf16": ("dense",),
}
# Runtimes whose lines run here, by the folder: transformers and GPTQModel, twice; mlx-lm; transformers;
# onnxruntime-genai; transformers and mlx-lm.
CARDS = {"merged": 2, "gptq8": 2, "mlx": 1, "gguf": 1, "onnx": 1, "hf16": 2}
TOLERANCE = TOLERANCES | {"dense": 1e-3, "awq": 0.02, "awq-gptqmodel": 0.03, "gguf": 0.02, "mlx": 0.03}
TOLERANCE |= {"onnx": 1e-4, "onnx-genai": 1e-4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A base, the offset of the merge, and a target; ``lossy`` where that does not hold the model exactly."""

    base: str
    offset: str
    target: str
    lossy: bool = False

    @property
    def name(self) -> str:
        return f"{self.base}-{self.offset}-{self.target}"


CASES = (
    Case(TRAINED, "none", "gptq8"),
    Case(TRAINED, "none", "awq"),
    Case(TRAINED, "none", "mlx"),
    Case(TRAINED, "none", "gguf", lossy=True),
    Case(TRAINED, "none", "hf16", lossy=True),
    Case(TRAINED, "reference", "mlx"),
    Case(TRAINED, "reference", "gptq8", lossy=True),
    Case("ckpt-llamapos-b4g32-asym", "none", "awq"),
    Case("ckpt-llamapos-b4g32-asym", "reference", "mlx"),
    Case("ckpt-llamapos-b3g32-asym", "reference", "mlx"),
    Case("ckpt-llamapos-b3g32-asym", "none", "gptq8"),
    Case("ckpt-qwen2-b4g32-sym-desc", "none", "gptq8"),
    Case("ckpt-llama-b4g32-asym-desc", "reference", "hf16", lossy=True),
    Case("random-qwen2-b2g64", "reference", "mlx"),
    Case("random-llama-b8g128", "reference", "mlx"),
    Case("random-qwen2-b2g64", "none", "gptq8"),
    Case(TRAINED, "none", "onnx"),
    Case(TRAINED, "reference", "onnx"),
    Case("ckpt-llamapos-b4g32-asym", "reference", "onnx"),
    Case("ckpt-llamapos-b3g32-asym", "none", "onnx"),
    Case("ckpt-llama-b4g32-asym-desc", "reference", "onnx"),
    Case("ckpt-qwen2-b8g64-sym-partial", "reference", "onnx"),
    Case("random-llama-b8g128", "reference", "onnx"),
    Case("random-qwen2-b2g64", "reference", "onnx"),
    Case("random-llama-b4g64-tied", "reference", "onnx"),
    Case("random-llama-b8g32-tied", "none", "onnx"),
    Case("random-qwen2-b4g64-untied", "reference", "onnx"),
    Case("random-qwen2-b8g32-untied", "none", "onnx"),
)


def merged(case: Case, root: Path) -> tuple[CheckpointFolder, Decoder]:
    if case.base == TRAINED:
        output = root / f"{case.base}-{case.offset}"
        if not output.is_dir():
            flags = ["--max_steps", "15", "--offset", case.offset, "--moved", "0.1", "--output_dir", str(output)]
            assert train.main(flags) == 0
        return CheckpointFolder(output / "merged"), convert.load_merged(output / "merged", progress=False)
    if case.base.startswith("random"):
        _, kind, grid, *ties = case.base.split("-")
        tied = ties == ["tied"] if ties else kind == "qwen2"
        bits, group_size = map(int, grid[1:].split("g"))
        sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
        config = DecoderConfig.from_hf({"model_type": kind, "tie_word_embeddings": tied} | sizes)
        path = root / "bases" / case.base
        if not path.is_dir():
            model = quantized_decoder(config, QuantSpec(bits, group_size))
            convert.write_checkpoint(model, path, tokenizer_from=checkpoint("tokenizer"), progress=False)
    else:
        source = checkpoint(case.base)
        assert source is not None
        path = with_tokenizer(source, root / "bases" / case.base)
    base = CheckpointFolder(path)
    return base, merge(trained(base, offset=case.offset))


@pytest.fixture(scope="module")
def logits(
    tmp_path_factory: pytest.TempPathFactory, client_python: str
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray | str]]:
    """By case and client: ours of the base, ours of what the target holds, and the client's."""
    root = tmp_path_factory.mktemp("targets")
    jobs: list[dict[str, object]] = []
    ours: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for case in CASES:
        base, model = merged(case, root)
        ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 24), dtype=np.int32)
        np.save(root / f"{case.name}.ids.npy", ids)
        folder = root / case.name
        given = {"base": base, "target": case.target, "allow_lossy": case.lossy, "progress": False}
        report = convert.save_pretrained(model, folder, **given)
        assert report.exact == (not case.lossy)
        # Where something is lost, the client is to compute what is left: that of our own reading of the folder.
        read_here = case.lossy and case.target != "gguf"
        held = load_decoder(CheckpointFolder(folder), jnp.float32, progress=False) if read_here else model
        ours[case.name] = np.asarray(load_decoder(base, jnp.float32, progress=False)(ids)), np.asarray(held(ids))
        for kind in CLIENTS[case.target]:
            files = {"folder": str(folder), "input_ids": str(root / f"{case.name}.ids.npy")}
            jobs.append(
                files
                | {
                    "kind": kind,
                    "bits": 4 if case.target == "awq" else 8,
                    "adapter": None,
                    "output": f"{folder}.{kind}.npy",
                }
            )
    found = run_client(client_python, jobs, root)
    return {
        (case.name, kind): (*ours[case.name], found[f"{root / case.name}.{kind}.npy"])
        for case in CASES
        for kind in CLIENTS[case.target]
    }


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in CLIENTS[case.target]],
    ids=lambda value: getattr(value, "name", value),
)
def test_client_computes_our_logits(
    logits: dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray | str]], case: Case, kind: str
) -> None:
    base, held, theirs = logits[case.name, kind]
    here = distance(held, theirs)
    print(f"{case.name} {kind}: {here:.2e}")
    assert here <= TOLERANCE[kind]
    if case.base != TRAINED:  # There the base of the export is the merged folder, with the same integers.
        # The check can see integers that were not written: base and merged model are far apart on this scale.
        assert distance(base, held) > 4 * here


RUN_BLOCKS = """
import json, re, sys, traceback
failed = {}
for path in sys.argv[1:]:
    for i, block in enumerate(re.findall("```python\\n(.*?)```", open(path + "/README.md").read(), re.DOTALL)):
        try:
            names = {}
            exec(block, names)
            assert names["model"] is not None
        except Exception:
            failed[f"{path}, block {i}"] = block + traceback.format_exc()
print(json.dumps(failed))
"""


def test_the_lines_of_the_cards_load_their_folders(tmp_path: Path, client_python: str) -> None:
    """Those of all software that is here, run as they stand in README.md, from the folder above."""
    flags = ["--max_steps", "2", "--offset", "reference", "--output_dir", str(tmp_path / "run")]
    assert train.main(flags) == 0
    base = CheckpointFolder(tmp_path / "run" / "merged")
    model = convert.load_merged(base.path, progress=False)
    (tmp_path / "run" / "merged").rename(tmp_path / "merged")
    base = CheckpointFolder(tmp_path / "merged")
    for target in ("gptq8", "mlx", "gguf", "onnx", "hf16"):
        given = {"base": base, "target": target, "allow_lossy": True, "progress": False}
        convert.save_pretrained(model, tmp_path / target, **given)
    blocks = {name: (tmp_path / name / "README.md").read_text().count("```python") for name in CARDS}
    assert blocks == CARDS
    failed = json.loads(run_python(client_python, "-c", RUN_BLOCKS, *CARDS, cwd=tmp_path).splitlines()[-1])
    assert not failed, "\n".join(failed.values())


TOKENS = """
import json, sys
import onnxruntime_genai as og
from transformers import AutoTokenizer
texts = json.loads(sys.argv[1])
wrong = []
for path in sys.argv[2:]:
    theirs, expected = og.Tokenizer(og.Model(path)), AutoTokenizer.from_pretrained(path)
    for text in texts:
        found = [int(token) for token in theirs.encode(text)]
        if found != expected.encode(text):
            wrong.append([path, text, found, expected.encode(text)])
        back = expected.decode(found, skip_special_tokens=True)
        if theirs.decode(found) != back:
            wrong.append([path, text, theirs.decode(found), back])
print(json.dumps(wrong))
"""
TEXTS = [
    "Hello, it's 1234567 apples!",
    "  two  spaces\n\nand lines\r\n ",
    "äöü 漢字 <s></s>",
    "<|im_start|>user\nhi<|im_end|>\n",
]


def test_onnxruntime_makes_the_tokens_of_transformers(tmp_path: Path, client_python: str) -> None:
    """Of byte-level BPE that cuts text as Llama 3 and Qwen2 do."""
    for name, digits in (("llama", r"\p{N}{1,3}"), ("qwen2", r"\p{N}")):
        source = changed_tokenizer(tmp_path / f"{name}.base", pre_tokenizer=split(digits))
        model = quantized_decoder(config(name), QuantSpec(4, 32))
        convert.save_pretrained(model, tmp_path / name, tokenizer_from=source, target="onnx", progress=False)
    said = run_python(client_python, "-c", TOKENS, json.dumps(TEXTS), "llama", "qwen2", cwd=tmp_path)
    assert json.loads(said.splitlines()[-1]) == []
