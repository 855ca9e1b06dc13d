"""Scripts run from flags to file: those that time kernels with tiny layers and a clock that counts runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lotaqaf_jax.generation import generate
from lotaqaf_jax.models import add_adapters, merge
from tests.convert.dense import QWEN, write_model
from tests.data.conftest import byte_tokenizer
from tests.models.tiny import quantized_decoder
from tests.weights import Grid

pytest.importorskip("triton")
pytest.importorskip("torch")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SECONDS = 6e-6

Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script as it imports its neighbours; takes all of them out again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    # The scripts set this for a card.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def run(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs ``main`` of a script with flags, under the interpreter, and returns what it wrote."""

    def clock(program: Callable[[], Any], repeats: int = 3) -> float:
        program()
        return SECONDS

    monkeypatch.setattr(load("common"), "device_seconds", clock)
    operations, matmul = load("operations"), load("matmul")
    for module, settings in (
        # The interpreter does not round to 16 and 8 bits as a card does.
        (load("common"), {"CACHE": 1}),
        (operations, {"CALLS": 2, "TOKENS": 64, "LAYERS": 2, "DTYPE": "float32"}),
        (matmul, {"CALLS": 2}),
        (load("candidates"), {"CALLS": 2, "DTYPE": "float32", "MATMUL_CALLS": 1}),
    ):
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)

    def main(script: str, *flags: str) -> dict[str, Any]:
        file = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [script, *flags, "--json", str(file)])
        with contextlib.suppress(SystemExit):  # whether it passed is in the file
            load(script).main()
        return json.loads(file.read_text())

    return main


def test_the_device_is_timed_alone_and_needs_a_card(load: Load) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a card")
    with pytest.raises(SystemExit, match="No events of a GPU in the profile: JAX runs on 'cpu'"):
        load("common").device_seconds(lambda: jax.block_until_ready(jax.numpy.arange(3) + 1))


def test_time_is_the_median_of_three_runs_after_a_first(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    common, runs = load("common"), []
    given = iter([{"a": (2, 5.0)}, {"a": (2, 1.0), "copy": (1, 1.0)}, {"a": (2, 7.0)}])

    def kernel_times(run: Callable[[], Any]) -> Any:
        run()
        return next(given), 9.0

    monkeypatch.setattr(common, "kernel_times", kernel_times)
    assert common.device_seconds(lambda: runs.append(0)) == 5.0
    assert len(runs) == 4


def test_kernels(run: Callable[..., dict[str, Any]]) -> None:
    names = ("adjusted", "merge", "dequantize", "gradient", "threshold")
    found = run("kernels", "--shapes", "64x32", "--bits", "4", "3", "--rank", "8", "--omega", "4", "--only", *names)
    calls = [line["call"] for line in found["lines"]]
    assert calls == ["adjusted", "merge", "dequantize", "gradient", "adjusted", "merge", "dequantize", "threshold"]
    assert all(line["agrees"] for line in found["lines"])
    # A program makes as many calls as there are inputs.
    assert found["lines"][0]["triton"] == pytest.approx(1e6 * SECONDS / 2)


def test_kernels_tells_of_another_result(run: Callable[..., Any], load: Load) -> None:
    operations = load("operations")
    columns = {"xla": lambda x: x, "triton": lambda x: x + 1}
    line = operations.Line("nothing", columns, [(jax.numpy.ones(3),)], 8.0)
    assert not load("kernels").measure(line)["agrees"]


def test_matmul(run: Callable[..., dict[str, Any]]) -> None:
    found = run("matmul", "--shapes", "64x32+16", "--rows", "1", "--no-peers")
    assert [line["widths"] for line in found["lines"]] == [[32, 16]]
    assert all(line["error"] < 0.02 for line in found["lines"])
    assert all(
        line[name] == pytest.approx(1e6 * SECONDS / 4) for line in found["lines"] for name in ("packed", "apart")
    )


def test_the_check_of_attention_tells_of_another_cache(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = load("check_kernels")
    monkeypatch.setattr(checks, "ATTENTION", (((4, 2), (3, 70), "float16", 16),))
    passed, line = checks.check_attention(0)
    assert passed
    assert line.endswith("ok")
    original = checks.cached_attention

    def elsewhere(*arguments: Any, implementation: str) -> tuple[Any, ...]:
        mixed, keys, values = original(*arguments, implementation=implementation)
        return mixed, keys, values + (implementation == "triton")

    monkeypatch.setattr(checks, "cached_attention", elsewhere)
    passed, line = checks.check_attention(0)
    assert not passed
    assert line.endswith("FAILED values")


def test_the_check_of_repeats_tells_of_one_run_that_differs(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = load("check_kernels")
    monkeypatch.setattr(checks, "REPEATS", 3)
    monkeypatch.setattr(checks, "REPEATED", ((Grid(4, 64, 32, 32), "reference", "window"),))
    plain, calls = checks.outputs("xla"), itertools.count()
    monkeypatch.setattr(checks, "outputs", lambda _: plain)
    assert checks.check_repeats(0)[0]

    def once(*arguments: Any) -> dict[str, Any]:
        found = plain(*arguments)
        return found if next(calls) != 2 else found | {"biased": found["biased"] + 1}

    monkeypatch.setattr(checks, "outputs", lambda _: once)
    passed, line = checks.check_repeats(0)
    assert not passed
    assert line.endswith("FAILED ['biased'] 1 times")


def test_the_checks_of_models_tell_of_other_words_and_tokens(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = load("agreement")
    model = agreement.with_random_adapters(add_adapters(quantized_decoder(), 6, 1.7))
    assert agreement.merge_differs(model) == []
    merged = merge(model)
    prompt = np.arange(12, dtype=np.int32).reshape(2, 6)
    written = np.array(generate(merged, prompt, np.full(2, 6), max_new_tokens=5).tokens)
    assert agreement.generation_gap(merged, prompt, written) == (0, 0)
    written[1, 3] = (written[1, 3] + 1) % model.config.vocab_size
    missed, gap = agreement.generation_gap(merged, prompt, written)
    assert missed > 0
    assert gap > 0

    def shifted(model: Any, *, donate: bool = False) -> Any:
        merged = merge(model, donate=donate)
        w = merged.segments[0].linear("mlp.up_proj").weight
        w.set_value(dataclasses.replace(w.get_value(), qweight=w.get_value().qweight.at[1, 2, 3].add(1)))
        return merged

    monkeypatch.setattr(agreement, "merge", shifted)
    assert agreement.merge_differs(model, donate=True) == ["model.layers.0.mlp.up_proj"]


def test_tune_marks_the_entry_in_use_and_names_what_fails(
    run: Callable[..., dict[str, Any]], load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates, original = load("candidates"), load("candidates").transposed

    def transposed(x: Any, scale: Any, dtype: Any, *, blocks: Any) -> Any:
        if blocks.rows == 32:
            raise ValueError("out of resource: registers\nmore")
        return original(x, scale * (2 if blocks.rows == 128 else 1), dtype, blocks=blocks)

    monkeypatch.setattr(candidates, "transposed", transposed)
    (table,) = run("tune", "--only", "transpose", "--shapes", "64x32", "--tokens", "64")["tables"]
    results = table["results"]
    assert len(results) > 8
    assert [one["current"] for one in results].count(True) == 1
    for one in results:
        rows, problem = one["blocks"]["rows"], one["problem"]
        assert (one["microseconds"] is None) == (rows != 64) == bool(problem)
        assert problem.startswith({32: "ValueError: out of resource", 64: "", 128: "another result"}[rows])
    assert [one["microseconds"] is None for one in results] == sorted(one["microseconds"] is None for one in results)
    assert "  *       3.0  rows 64, columns 64, warps 4" in capsys.readouterr().out.splitlines()


def test_every_kernel_has_candidates_that_give_its_result(run: Callable[..., Any], load: Load) -> None:
    options = argparse.Namespace(bits=[4], rows=[1], group_size=32, rank=8, omega=4.0, tokens=64)
    for name, make in load("candidates").CASES.items():
        (case,) = make(64, 32, options)
        other = [blocks for blocks in case.candidates if blocks != case.current]
        assert len(set(other)) >= 5, name
        results = load("tune").tune(dataclasses.replace(case, candidates=other[-1:]))
        assert len(results) == 2, name
        assert all(not one.problem and one.error <= case.tolerance for one in results), name


PEER = """
import json, sys
import convert, numpy as np
jobs = json.load(open(sys.argv[1]))
for job in jobs:
    with np.load(job["calibration"]) as file:
        samples = [file[name] for name in sorted(file.files, key=int)]
    settings = {"bits": job["bits"], "group_size": job["group_size"], "sym": job["options"].get("sym", True)}
    convert.quantize(job["model"], job["output"], calibration=samples, grid_search="mse" in job["options"], **settings)
done = {"jobs": [{"seconds": 3.0, "config": {"bits": job["bits"]}} for job in jobs], "versions": {"gptqmodel": "7"}}
json.dump(done, open(sys.argv[1] + ".done", "w"))
"""


def test_quantizers(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole comparison, with our quantiser in the place of the peer: what both write is the same, and so is its
    loss."""
    quantizers, dense, texts = load("quantizers"), tmp_path / "dense", tmp_path / "texts.jsonl"
    write_model(dense, QWEN)
    texts.write_text("".join(json.dumps({"text": f"{i} and\n{i * i} more of them"}) + "\n" for i in range(90)))
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(quantizers, "PEER", tmp_path / "peer.py")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    flags = ["--model", str(dense), "--group-size", "16", "--bits", "3", "--length", "24", "--samples", "6"]
    flags += ["--calibration", f"{texts}[30:]", "--heldout", f"{texts}[:20]", str(texts), "--heldout-samples", "5"]
    flags += ["--seeds", "0", "--peer-python", sys.executable, "--peer", '{"mse": 2.4}', "--ours", '{"sym": true}']
    monkeypatch.setattr(sys, "argv", ["quantizers", *flags, "--json", str(tmp_path / "results.json")])
    quantizers.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["peer"]["versions"] == {"gptqmodel": "7"}
    assert found["peer"]["configs"] == [{"bits": 3}, {"bits": 3}]
    lines = {line["what"]: line for line in found["lines"]}
    assert list(lines) == ["16-bit", "lotaqaf_jax", "lotaqaf_jax sym True", "GPTQModel", "GPTQModel mse 2.4"]
    assert lines["GPTQModel mse 2.4"]["loss"] == lines["lotaqaf_jax"]["loss"]
    assert lines["GPTQModel"]["seconds"] == 3
    assert len({tuple(line["loss"].values()) for line in found["lines"]}) == 4
    assert list(lines["16-bit"]["loss"]) == [f"{texts}[:20]", str(texts)]
    # The table's perplexity is that of the loss.
    loss = lines["GPTQModel"]["loss"][str(texts)]
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| GPTQModel | 3"))
    assert f"| {loss:.4f} | {math.exp(loss):.3f} | 3 |" in row


def test_quantizers_cut_their_text(load: Load, tmp_path: Path) -> None:
    quantizers, texts = load("quantizers"), tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i}\n{i}"}) + "\n" for i in range(10, 50)))
    tokenizer = byte_tokenizer()
    documents = quantizers.tokenized(f"{texts}[2:4]", tokenizer, True)
    assert [tokenizer.decode(ids) for ids in documents] == ["12 12</s>", "13 13</s>"]
    options = argparse.Namespace(rows=False, length=4, samples=2, heldout_samples=2)
    assert [tokenizer.decode(ids) for ids in quantizers.heldout(documents, options)] == ["12 1", "2</s>13"]
    options.rows = True
    assert [tokenizer.decode(ids) for ids in quantizers.heldout(documents, options)] == ["12 1", "13 1"]
    everything = quantizers.tokenized(str(texts), tokenizer, False)
    drawn = [[ids.tolist() for ids in quantizers.calibration(everything, options, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    (batch,) = quantizers.batches([np.array([5, 6, 7]), np.array([8])])
    assert batch["labels"][:2].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert batch["segment_ids"][:3].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_tiles_of_steps_hold_whole_groups(load: Load, bits: int, group_size: int) -> None:
    candidates = load("candidates")
    values = candidates.packed_values(bits)
    current, tiles = candidates.step_tiles(bits, argparse.Namespace(group_size=group_size, rank=64))
    assert current in tiles
    assert len(tiles) >= 5
    assert all(tile.periods * values % group_size == 0 for tile in tiles)
