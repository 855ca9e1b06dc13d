"""Rows hold every example once, keep to their length and keep examples apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.data.packing import collate, plan_rows
from lotaqaf_jax.data.tokenize import IGNORE, TokenizedExamples

LENGTH = 16
PAD = 7777

lengths_of_examples = st.lists(st.integers(1, LENGTH), min_size=1, max_size=40)


def examples_of(lengths: list[int]) -> TokenizedExamples:
    """Examples whose tokens are all different: 100 i + position; the loss is on the second half of each."""
    offsets = np.cumsum([0, *lengths])
    ids = np.concatenate([100 * i + np.arange(length) for i, length in enumerate(lengths)])
    loss = np.concatenate([np.arange(length) >= max(1, length // 2) for length in lengths])
    return TokenizedExamples(ids.astype(np.int32), loss, offsets, tuple(map(str, lengths)))


def all_rows(lengths: list[int], *, packing: bool, seed: int = 0) -> dict[str, np.ndarray]:
    plan = plan_rows(lengths, LENGTH, packing=packing, seed=seed)
    return collate(plan, examples_of(lengths), batch_size=len(plan), row_length=LENGTH, pad_id=PAD)


@given(lengths_of_examples, st.booleans())
def test_every_token_of_every_example_occurs_once_with_its_label(lengths, packing):
    examples, batch = examples_of(lengths), all_rows(lengths, packing=packing)
    real = batch["segment_ids"] > 0
    order = np.argsort(batch["input_ids"][real])
    np.testing.assert_array_equal(batch["input_ids"][real][order], examples.input_ids)
    expected = np.concatenate([labels for _, labels in examples])
    np.testing.assert_array_equal(batch["labels"][real][order], expected)


@given(lengths_of_examples, st.booleans())
def test_examples_stand_apart_and_positions_restart(lengths, packing):
    batch = all_rows(lengths, packing=packing)
    for ids, labels, positions, segments in zip(
        *(batch[name] for name in ("input_ids", "labels", "positions", "segment_ids")), strict=True
    ):
        count = segments.max()
        assert count >= 1
        assert set(segments) <= set(range(count + 1))
        for segment in range(1, count + 1):
            here = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(here, np.arange(here[0], here[-1] + 1))
            assert len(set(ids[here] // 100)) == 1, "one segment, one example"
            np.testing.assert_array_equal(positions[here], np.arange(len(here)))
            assert labels[here[0]] == IGNORE
        padding = segments == 0
        assert (ids[padding] == PAD).all()
        assert (labels[padding] == IGNORE).all()
        assert (positions[padding] == 0).all()
        assert not padding[: np.count_nonzero(segments)].any(), "padding comes last"


@given(lengths_of_examples, st.booleans())
def test_the_batch_contract_shapes_and_types(lengths, packing):
    for array in all_rows(lengths, packing=packing).values():
        assert array.dtype == np.int32
        assert array.shape[1] == LENGTH


@given(lengths_of_examples)
def test_packing_never_opens_a_row_that_it_does_not_need(lengths):
    rows = plan_rows(lengths, LENGTH, packing=True, seed=0)
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    # Any-fit: two rows that fit into one would have been one.
    assert len(filled) < 2 or filled[0] + filled[1] > LENGTH
    assert sum(lengths) <= len(rows) * LENGTH


@given(lengths_of_examples, st.integers(0, 2**32 - 1))
def test_the_plan_is_a_function_of_lengths_and_seed(lengths, seed):
    once = plan_rows(lengths, LENGTH, packing=True, seed=seed)
    assert plan_rows(np.asarray(lengths), LENGTH, packing=True, seed=seed) == once


def test_the_seed_decides_which_examples_of_one_length_share_a_row():
    lengths = [LENGTH // 2] * 30
    plans = {str(plan_rows(lengths, LENGTH, packing=True, seed=seed)) for seed in range(3)}
    assert len(plans) == 3


def test_best_fit_takes_the_fullest_row_with_room():
    rows = plan_rows([12, 9, 6, 4, 1], LENGTH, packing=True, seed=0)
    assert rows == [[0, 3], [1, 2, 4]]


def test_without_packing_a_row_is_an_example_in_file_order():
    assert plan_rows([3, 1, 2], LENGTH, packing=False, seed=9) == [[0], [1], [2]]


def test_missing_rows_of_a_batch_are_padding():
    batch = collate([[0]], examples_of([3]), batch_size=3, row_length=LENGTH, pad_id=PAD)
    assert batch["segment_ids"].sum(axis=1).tolist() == [3, 0, 0]
    assert (batch["labels"][1:] == IGNORE).all()


def test_an_example_longer_than_a_row_is_a_programming_error():
    with pytest.raises(ValueError, match="17 tokens does not fit into a row of 16"):
        plan_rows([3, 17], LENGTH, packing=True, seed=0)
