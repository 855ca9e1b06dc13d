"""The stream of batches: order, epochs, resuming, held-out rows and the report."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lotaqaf_jax.data import DataConfig, load_data
from lotaqaf_jax.data.tokenize import IGNORE
from lotaqaf_jax.errors import DataError

ROWS = 11


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    """Eleven prompts with completions of different lengths: A, BB, CCC, ..."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"row {i}:", "completion": chr(ord("A") + i) * (i + 1)} for i in range(ROWS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def load(tokenizer, dataset: str, batch_size: int = 4, eval_batch_size: int | None = None, **options):
    config = DataConfig(dataset, **{"max_seq_length": 64, **options})
    return load_data(config, tokenizer, batch_size, eval_batch_size, progress=False)


def answers(tokenizer, batches) -> list[str]:
    """The completion of every example in the batches, in order."""
    found = []
    for batch in batches:
        for labels, segments in zip(batch["labels"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                kept = labels[(segments == segment) & (labels != IGNORE)]
                found.append(tokenizer.decode(kept).removesuffix("</s>"))
    return found


EVERYTHING = sorted(chr(ord("A") + i) * (i + 1) for i in range(ROWS))


def same(a, b) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a.keys() | b.keys())


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_example_once_and_epochs_differ_in_order(plain, rows, packing):
    stream = load(plain, rows, batch_size=3, packing=packing).train
    epochs = [answers(plain, islice(stream, stream.steps_per_epoch)) for _ in range(3)]
    assert all(sorted(epoch) == EVERYTHING for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_all_batches_have_one_shape_and_the_last_of_an_epoch_is_filled_up(plain, rows):
    stream = load(plain, rows, batch_size=4).train
    batches = list(islice(stream, 6))
    assert stream.steps_per_epoch == 3
    assert {array.shape for batch in batches for array in batch.values()} == {(4, stream.row_length)}
    full_rows = [int((batch["segment_ids"].max(axis=1) > 0).sum()) for batch in batches]
    assert full_rows == [4, 4, 3, 4, 4, 3]


def test_the_same_seed_gives_the_same_batches_and_another_seed_does_not(plain, rows):
    one, again, other = (list(islice(load(plain, rows, seed=seed).train, 6)) for seed in (5, 5, 6))
    assert all(map(same, one, again))
    assert not all(map(same, one, other))


def test_the_next_seed_is_not_the_next_epoch(plain, rows):
    first, second = (load(plain, rows, seed=seed).train for seed in (0, 1))
    assert answers(plain, islice(first, 3, 6)) != answers(plain, islice(second, 3))


@pytest.mark.parametrize("packing", [False, True])
def test_resuming_at_any_step_gives_the_same_remaining_batches(plain, rows, packing):
    stream, resumed = (load(plain, rows, packing=packing).train for _ in range(2))
    states, batches = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(stream.state())))
        batches.append(next(stream))
    for step in (5, 0, 8, 3, 2, 7):
        resumed.restore(states[step])
        assert all(map(same, batches[step:], islice(resumed, 12 - step)))


def test_the_state_is_small_and_does_not_change_by_being_asked_for(plain, rows):
    stream = load(plain, rows).train
    next(stream)
    assert stream.state() == stream.state()
    assert len(json.dumps(stream.state())) < 200


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"packing": True}, {"max_samples": 10}, {"max_seq_length": 12}, {"batch_size": 5}]
)
def test_a_place_in_other_data_is_refused(plain, rows, change):
    state = load(plain, rows).train.state()
    with pytest.raises(DataError, match="resume with the dataset, tokenizer, lengths, packing, batch size and seed"):
        load(plain, rows, **change).train.restore(state)


def test_peeking_does_not_move_the_stream(plain, rows):
    stream = load(plain, rows).train
    ahead = [stream.peek(step) for step in range(5)]
    assert all(map(same, ahead, islice(stream, 5)))


def test_the_order_is_not_that_of_the_file(plain, rows):
    stream = load(plain, rows).train
    assert answers(plain, islice(stream, 3)) != EVERYTHING


@pytest.mark.parametrize(
    ("batch_size", "epochs", "steps"),
    [(4, 1, 3), (4, 2, 6), (4, 0.5, 2), (11, 3, 3), (64, 1, 1), (1, 0.3, 4), (1, 3, 33)],
)
def test_the_number_of_steps(plain, rows, batch_size, epochs, steps):
    assert load(plain, rows, batch_size=batch_size).num_steps(epochs) == steps


def test_a_row_is_as_long_as_the_longest_example_rounded_up_or_as_asked_for_when_packing(plain, rows):
    assert load(plain, rows, max_seq_length=1000).train.row_length == 64
    assert load(plain, rows, max_seq_length=20).train.row_length == 20
    assert load(plain, rows, max_seq_length=1000, packing=True).train.row_length == 1000


# --- held-out rows


@pytest.mark.parametrize(("val_size", "count"), [(1, 1), (4, 4), (0.25, 3), (0.01, 1), (10, 10)])
def test_val_size_takes_rows_out_of_training(plain, rows, val_size, count):
    data = load(plain, rows, val_size=val_size)
    training = answers(plain, islice(data.train, data.train.steps_per_epoch))
    held_out = answers(plain, data.validation)
    assert len(held_out) == count
    assert sorted(training + held_out) == EVERYTHING
    assert held_out == sorted(held_out), "in file order"


def test_the_held_out_rows_depend_on_the_seed_alone(plain, rows):
    sets = [
        answers(plain, load(plain, rows, val_size=4, seed=s, packing=p).validation) for s, p in ((0, 0), (0, 1), (1, 0))
    ]
    assert sets[0] == sets[1]
    assert sets[0] != sets[2]


@pytest.mark.parametrize("val_size", [11, 12, 0.99])
def test_val_size_must_leave_something_to_train_on(plain, rows, val_size):
    with pytest.raises(DataError, match=f"val_size {val_size} leaves none of the 11 examples for training"):
        load(plain, rows, val_size=val_size)


def test_held_out_rows_from_a_split_or_dataset_of_their_own(plain, rows, tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(f"{split} a\n{split} b\n{split} c\n")
    by_split = load(plain, str(tmp_path), eval_split="validation")
    by_dataset = load(plain, rows, eval_dataset=str(tmp_path / "valid.txt"), max_eval_samples=2)
    by_default = load(plain, str(tmp_path / "train.txt"), eval_dataset=str(tmp_path))
    assert answers(plain, by_split.validation) == ["valid a", "valid b", "valid c"]
    assert answers(plain, by_dataset.validation) == ["valid a", "valid b"]
    assert answers(plain, by_default.validation) == answers(plain, by_split.validation)
    assert by_dataset.report.validation_examples == 2


def test_validation_can_be_gone_through_again_and_is_never_packed(plain, rows):
    validation = load(plain, rows, eval_batch_size=2, val_size=3, packing=True).validation
    once, again = list(validation), list(validation)
    assert len(validation) == len(once) == 2
    assert all(map(same, once, again))
    assert [batch["segment_ids"].max(axis=1).tolist() for batch in once] == [[1, 1], [1, 0]]
    assert len(validation.examples) == 3


def test_without_held_out_rows_there_is_no_validation(plain, rows):
    assert load(plain, rows).validation is None


# --- the report


def test_the_report_counts_what_became_of_the_rows(plain, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion,id\n{'p' * 60},a,1\np,{'b' * 60},2\np,,3\np,c,4\n")
    data = load(plain, str(path), max_source_length=20, max_target_length=10, skip_bad_rows=True)
    report = data.report
    assert (report.rows, report.examples, len(report.skipped)) == (4, 3, 1)
    assert (report.truncated_sources, report.truncated_targets) == (1, 1)
    assert report.ignored_columns == ("id",)
    real = [batch["segment_ids"] > 0 for batch in islice(data.train, data.train.steps_per_epoch)]
    assert report.tokens == sum(int(one.sum()) for one in real) == (20 + 2) + (2 + 10) + (2 + 2)
    assert report.loss_tokens == 2 + 10 + 2
    assert report.longest == 22
    text = str(report)
    for part in (
        "4 rows, format prompt",
        "1 sources, 1 targets",
        "1 rows that cannot be used",
        "columns id",
        "1 steps",
    ):
        assert part in text


@pytest.mark.parametrize("packing", [False, True])
def test_the_report_has_the_steps_of_the_stream(plain, rows, packing):
    data = load(plain, rows, packing=packing, batch_size=2)
    assert data.report.steps_per_epoch == data.train.steps_per_epoch == -(-data.report.rows_per_epoch // 2)
    assert data.report.rows_per_epoch == data.train.rows_per_epoch


def test_rows_that_the_template_refuses_count_as_skipped(llama2, tmp_path):
    path = tmp_path / "rows.jsonl"
    chats = [["user", "assistant"], ["user", "user", "assistant"]]
    rows = [{"messages": [{"role": role, "content": "x"} for role in chat]} for chat in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: the tokenizer's chat template refuses"):
        load(llama2, str(path))
    report = load(llama2, str(path), skip_bad_rows=True).report
    assert (report.rows, report.examples, len(report.skipped)) == (2, 1, 1)


# --- errors of the settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 0}, "max_samples is 0; give 1 or more"),
        ({"max_eval_samples": -1}, "max_eval_samples is -1"),
        ({"max_seq_length": 1}, "max_seq_length is 1; give 2 or more"),
        ({"max_source_length": 0}, "max_source_length is 0"),
        ({"max_target_length": 0}, "max_target_length is 0"),
        ({"val_size": -1}, "val_size is -1"),
        ({"val_size": 1.5}, "val_size is 1.5; give a count"),
        ({"val_size": 1, "eval_split": "test"}, "both name the held-out rows"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"dataset": ""}, "dataset is empty"),
    ],
)
def test_a_setting_out_of_range_is_named(options, message):
    with pytest.raises(DataError, match=message):
        DataConfig(**{"dataset": "gsm8k", **options})


@pytest.mark.parametrize("sizes", [(0, None), (4, 0)])
def test_a_batch_needs_a_row(plain, rows, sizes):
    with pytest.raises(DataError, match="batch_size is 0; give 1 or more"):
        load(plain, rows, *sizes)


def test_when_nothing_is_left_to_learn_the_dataset_is_named(bare, tmp_path):
    # EOS alone: it is the first token, and nothing predicts that.
    path = tmp_path / "eos.txt"
    path.write_text("</s>\n")
    with pytest.raises(DataError, match=r"eos.txt: all 1 examples have every label masked"):
        load(bare, str(path))


# --- the real thing


def test_the_paper_s_steps_on_viggo_with_packing_and_without(shared: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "checkpoints" / "base14m-qwen2-gptq-w4g64-asym")
    options = {"max_source_length": 1024, "max_target_length": 256, "max_seq_length": 1280}
    data = load(tokenizer, f"viggo:{shared / 'data' / 'viggo'}", 64, **options)
    assert data.num_steps(1) == 80
    assert data.report.truncated_sources == data.report.truncated_targets == 0
    batch = next(data.train)
    assert batch["input_ids"].shape == (64, 256)
    text = tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORE])
    assert text.endswith(")<|im_end|>")
