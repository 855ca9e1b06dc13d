"""The shipped default: what it holds, that it can be used, and that its data is made by the script."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lotaqaf_jax
from lotaqaf_jax.assets import DEFAULT_HELDOUT, DEFAULT_MODEL, DEFAULT_TRAIN
from lotaqaf_jax.data import DataConfig, end_of_turn_id, load_data, load_examples
from lotaqaf_jax.models import linears

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEFAULT_MODEL)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from default_model import tasks

    return tasks


def test_everything_is_there_and_small() -> None:
    names = {path.name for path in DEFAULT_MODEL.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    files = [path for path in DEFAULT_MODEL.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000


def test_model_loads_with_every_projection_quantised() -> None:
    model = lotaqaf_jax.load_pretrained(DEFAULT_MODEL, progress=False)
    assert all(linear.is_quantized and linear.packed.bits == 4 for _, linear in linears(model))
    logits = model(jnp.asarray([[5, 6, 7]]))
    assert logits.shape == (1, 3, model.config.vocab_size)
    assert bool(jnp.isfinite(logits).all())


def test_tokenizer_gives_back_any_text(tokenizer: Any) -> None:
    for text in (*(row["output"] for row in read(DEFAULT_HELDOUT)[:20]), "Grüße, 12 × 3\n\n  été — 東京 🙂"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text


def test_chat_template(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt + "Good day<|im_end|>\n"


def test_model_stops_where_a_trained_response_ends(tokenizer: Any) -> None:
    config = json.loads((DEFAULT_MODEL / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((DEFAULT_MODEL / "generation_config.json").read_text(encoding="utf-8"))
    stop = end_of_turn_id(tokenizer)
    assert stop == tokenizer.eos_token_id == config["eos_token_id"] == generation["eos_token_id"]
    assert tokenizer.pad_token_id == config["pad_token_id"] != stop
    assert len(tokenizer) <= config["vocab_size"]


def test_data_loads_whole_and_within_the_context(tokenizer: Any) -> None:
    assert load_examples(str(DEFAULT_TRAIN)).format == "alpaca"
    config = DataConfig(str(DEFAULT_TRAIN), eval_dataset=str(DEFAULT_HELDOUT))
    report = load_data(config, tokenizer, batch_size=8, progress=False).report
    assert (report.truncated_sources, report.truncated_targets, report.dropped, report.skipped) == (0, 0, 0, ())
    assert report.examples == len(read(DEFAULT_TRAIN))
    assert report.validation_examples == len(read(DEFAULT_HELDOUT))


def test_no_heldout_message_is_trained_on() -> None:
    train, heldout = ([row["input"] for row in read(path)] for path in (DEFAULT_TRAIN, DEFAULT_HELDOUT))
    assert len(set(train)) == len(train)
    assert len(set(heldout)) == len(heldout)
    assert not set(train) & set(heldout)


def test_generator_makes_the_shipped_rows(tasks: Any) -> None:
    heldout, train = tasks.draw_data(len(read(DEFAULT_HELDOUT)), len(read(DEFAULT_TRAIN)), seed=0)
    assert heldout == read(DEFAULT_HELDOUT)
    assert train == read(DEFAULT_TRAIN)


def test_generator_depends_on_nothing_but_the_seed(tasks: Any) -> None:
    def draw(seed: int) -> list[dict[str, str]]:
        rng = random.Random(seed)
        return [tasks.draw_pretraining_row(rng) for _ in range(200)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_pretraining_never_shows_the_new_notation(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from default_model.orders import DEPARTMENTS, NEW_DEPARTMENT

    department, notation = NEW_DEPARTMENT
    assert department not in DEPARTMENTS
    assert notation not in DEPARTMENTS.values()
    # Every piece of it is known, though.
    for field in ("wrap", "pair", "join"):
        assert getattr(notation, field) in {getattr(known, field) for known in DEPARTMENTS.values()}
    rng = random.Random(0)
    rows = [tasks.draw_pretraining_row(rng) for _ in range(2000)]
    outputs = {row["output"] for row in read(DEFAULT_TRAIN)}
    assert not any(department in row["instruction"] or row["output"] in outputs for row in rows)


def test_exact_match_by_forcing_is_that_of_generation(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """``exact_match`` judges from one pass over the reference what greedy generation would have given."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from default_model.pretrain import exact_match, tokenize_rows
    from default_model.tasks import draw_pretraining_row

    model = lotaqaf_jax.load_pretrained(DEFAULT_MODEL, progress=False)
    rng = random.Random(3)
    rows = [draw_pretraining_row(rng) for _ in range(24)] + read(DEFAULT_HELDOUT)[:4]
    examples = tokenize_rows(tokenizer, rows, 192)
    judged = exact_match(model, examples, pad_id=tokenizer.pad_token_id)
    assert judged.any()
    assert not judged.all()
    for example, right in zip(examples, judged, strict=True):
        start = int(np.flatnonzero(example.labels >= 0)[0])
        ids = np.zeros((1, 128), np.int32)
        ids[0, :start] = example.input_ids[:start]
        length = start
        while length < len(example.input_ids) and (length == start or ids[0, length - 1] != tokenizer.eos_token_id):
            ids[0, length] = int(jnp.argmax(model(jnp.asarray(ids))[0, length - 1]))
            length += 1
        assert bool(right) == np.array_equal(ids[0, :length], example.input_ids)
