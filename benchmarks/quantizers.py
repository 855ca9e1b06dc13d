"""Our GPTQ beside GPTQModel's: the same model, the same calibration tokens, the loss of both on held-out text.

    python benchmarks/quantizers.py --model FOLDER --group-size 64 --calibration TEXT [TEXT ...] \
        --heldout TEXT [TEXT ...] --peer-python OTHER_ENVIRONMENT/bin/python

A TEXT is a dataset as `python -m convert quantize` takes it, or some rows of one: `stories.jsonl.gz[300:600]`.
Documents are tokenised as for training. Calibration documents are shuffled by the seed, joined and cut into windows of
--length, of which --samples are drawn; held-out documents are joined in their order, and the first --heldout-samples
windows are scored. With --rows a document is a sample, cut at --length: the first documents held out, random ones to
calibrate on.

For every seed and width: `convert.quantize` with its defaults, and GPTQModel (gptqmodel_quantize.py, started once for
all of them) with its own: a damping of 0.05, rows in group-aware act-order, no search for ranges, a range for each
group from the weights as updated so far. What else --ours and --peer name, as JSON of keywords, is measured too; with
--peer '{"mse": 2.4}' it searches ranges, by the norm that our default has. Both give every group its zero point. Then
our own loss is taken of all folders, in nats per token, and its exponential. Seconds are those of quantising alone,
whatever else the machine does; ours compile in that time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, write_json

import convert
from convert.calibration import documents_of
from lotaqaf_jax.data import IGNORE, Limits, Text, tokenize_examples
from lotaqaf_jax.evaluation import evaluate
from lotaqaf_jax.models import load_pretrained
from lotaqaf_jax.models.pretrained import load_tokenizer

PEER = Path(__file__).with_name("gptqmodel_quantize.py")
BATCH = 16


def tokenized(text: str, tokenizer: Any, one_line: bool) -> list[np.ndarray]:
    """Token ids of every document of a TEXT."""
    found = re.fullmatch(r"(.*)\[(\d*):(\d*)\]", text)
    name, rows = (
        (text, slice(None))
        if found is None
        else (found[1], slice(*(int(n) if n else None for n in found.groups()[1:])))
    )
    documents, where = (part[rows] for part in documents_of(name))
    if one_line:
        documents = [Text(d.text.replace("\n", " ")) if isinstance(d, Text) else d for d in documents]
    ids = tokenize_examples(tokenizer, documents, where, Limits(whole=2**62), progress=False)
    return [example.input_ids for example in ids]


def windows(documents: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Joined and cut, (windows, length)."""
    joined = np.concatenate(documents)
    return joined[: len(joined) // length * length].reshape(-1, length)


def calibration(documents: list[np.ndarray], options: argparse.Namespace, seed: int) -> list[np.ndarray]:
    """The samples of a seed."""
    rng = np.random.default_rng(seed)
    shuffled = [documents[i] for i in rng.permutation(len(documents))]
    if options.rows:
        return [ids[: options.length] for ids in shuffled[: options.samples]]
    cut = windows(shuffled, options.length)
    return list(cut[rng.permutation(len(cut))[: options.samples]])


def heldout(documents: list[np.ndarray], options: argparse.Namespace) -> list[np.ndarray]:
    """The samples to score."""
    if options.rows:
        return [ids[: options.length] for ids in documents[: options.heldout_samples]]
    return list(windows(documents, options.length)[: options.heldout_samples])


def batches(samples: list[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """One sample a row, for `evaluate`."""
    length = max(map(len, samples))
    for start in range(0, len(samples), BATCH):
        ids, labels = np.zeros((BATCH, length), np.int32), np.full((BATCH, length), IGNORE, np.int32)
        segments = np.zeros((BATCH, length), np.int32)
        for row, sample in enumerate(samples[start : start + BATCH]):
            ids[row, : len(sample)], labels[row, 1 : len(sample)], segments[row, : len(sample)] = sample, sample[1:], 1
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
        yield {"input_ids": ids, "labels": labels, "positions": positions, "segment_ids": segments}


def losses(folder: Path, texts: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Nats per token on every held-out text."""
    model = load_pretrained(folder, progress=False)
    return {name: evaluate(model, batches(samples)).loss for name, samples in texts.items()}


def named(keywords: dict[str, Any]) -> str:
    """What distinguishes a line from its software's defaults."""
    return ", ".join(f"{key} {value}" for key, value in keywords.items())


def run_peer(jobs: list[dict[str, Any]], folder: Path, python: str) -> dict[str, Any]:
    """All jobs of GPTQModel in one process of its own environment."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    # -P: benchmarks/kernels.py would be found before the package kernels.
    command = [python, "-P", str(PEER), str(file)]
    variables = {"GPTQMODEL_CPU_WORKERS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, cwd=folder, check=False)
    if run.returncode:
        raise SystemExit(f"GPTQModel failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    return json.loads(Path(f"{file}.done").read_text())


def measure(options: argparse.Namespace, work: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All lines, and what the peer says of itself."""
    tokenizer = load_tokenizer(options.model)
    source = [ids for text in options.calibration for ids in tokenized(text, tokenizer, options.one_line)]
    texts = {text: heldout(tokenized(text, tokenizer, options.one_line), options) for text in options.heldout}
    lines: list[dict[str, Any]] = []

    def add(what: str, seed: int | None, bits: int, seconds: float | None, folder: Path) -> None:
        line = {"what": what, "seed": seed, "bits": bits, "seconds": seconds, "loss": losses(folder, texts)}
        lines.append(line)
        print(json.dumps(line), flush=True)

    add("16-bit", None, 16, None, options.model)
    jobs: list[dict[str, Any]] = []
    labels: list[tuple[str, int, int]] = []
    for seed in options.seeds:
        samples = calibration(source, options, seed)
        file = work / f"calibration{seed}.npz"
        np.savez(file, **{str(i): ids for i, ids in enumerate(samples)})
        for bits in options.bits:
            for i, keywords in enumerate([{}, *options.ours]):
                out = work / f"ours{i}-{bits}-{seed}"
                start = time.perf_counter()
                sizes = {"bits": bits, "group_size": options.group_size}
                convert.quantize(options.model, out, calibration=samples, progress=False, **sizes, **keywords)
                add(f"lotaqaf_jax {named(keywords)}".strip(), seed, bits, time.perf_counter() - start, out)
            for i, keywords in enumerate([{}, *options.peer] if options.peer_python else []):
                out = work / f"peer{i}-{bits}-{seed}"
                job = {"model": str(options.model.resolve()), "calibration": str(file), "output": str(out)}
                sizes = {"bits": bits, "group_size": options.group_size}
                jobs.append(job | sizes | {"options": {"sym": False} | keywords})
                labels.append((f"GPTQModel {named(keywords)}".strip(), seed, bits))
    if not jobs:
        return lines, {}
    done = run_peer(jobs, work, options.peer_python)
    for job, (what, seed, bits), result in zip(jobs, labels, done["jobs"], strict=True):
        add(what, seed, bits, result["seconds"], Path(job["output"]))
    return lines, {"versions": done["versions"], "configs": [job["config"] for job in done["jobs"]]}


def table(lines: list[dict[str, Any]]) -> str:
    """Means over seeds, and their largest distance from the mean, as a table in Markdown."""
    names = list(lines[0]["loss"])
    head = ["", "bits", *(f"{Path(name).name}: loss | perplexity" for name in names), "seconds"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * (2 * len(names) + 3)]
    for bits in dict.fromkeys(line["bits"] for line in lines):
        for what in dict.fromkeys(line["what"] for line in lines if line["bits"] == bits):
            found = [line for line in lines if (line["bits"], line["what"]) == (bits, what)]
            cells = [what, str(bits)]
            for name in names:
                values = np.array([line["loss"][name] for line in found])
                spread = f" ± {np.abs(values - values.mean()).max():.4f}" if len(values) > 1 else ""
                cells += [f"{values.mean():.4f}{spread}", f"{np.exp(values.mean()):.3f}"]
            seconds = [line["seconds"] for line in found if line["seconds"] is not None]
            rows.append("| " + " | ".join([*cells, f"{np.mean(seconds):.0f}" if seconds else ""]) + " |")
    return "\n".join(rows)


def main() -> None:
    """Quantise with both, evaluate, print, write results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a 16-bit model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--heldout", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--samples", type=int, default=128, help="to calibrate on")
    parser.add_argument("--heldout-samples", type=int, default=64, help="to score, of every text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--rows", action="store_true", help="a document is a sample")
    parser.add_argument("--one-line", action="store_true", help="newlines of plain text become spaces")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--peer-python", help="the interpreter of an environment with GPTQModel; without, ours alone")
    parser.add_argument(
        "--ours", type=json.loads, nargs="*", default=[], help="more keywords of convert.quantize, JSON"
    )
    parser.add_argument("--peer", type=json.loads, nargs="*", default=[], help="more keywords of QuantizeConfig, JSON")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        lines, peer = measure(options, Path(work))
    print(table(lines))
    versions = {name: metadata.version(name) for name in ("transformers", "tokenizers", "flax")}
    write_json(options, {"lines": lines, "peer": peer}, environment() | versions)


if __name__ == "__main__":
    main()
