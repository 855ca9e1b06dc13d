"""The preview shows what the model gets, token by token."""

from __future__ import annotations

import re

import pytest

from lotaqaf_jax.data import DataConfig, load_data, preview


@pytest.fixture
def stream(chatml, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\nab,cd\n"a\nä",c\n')
    return load_data(DataConfig(str(path)), chatml, 2, progress=False).train


def test_each_run_of_tokens_is_a_line_with_its_mask(chatml, stream):
    blocks = preview(stream, chatml, 2).strip().split("\n\n")
    assert {re.sub(r"row \d", "row ?", block) for block in blocks} == {
        "row ?, example 1: 5 tokens, 3 in the loss\n  -    a·b  (2)\n  loss c·d·<|im_end|>  (3)",
        # The bytes of ä are shown by their names in the vocabulary.
        "row ?, example 1: 6 tokens, 2 in the loss\n  -    a·\\n·Ã·¤  (4)\n  loss c·<|im_end|>  (2)",
    }


def test_only_as_many_examples_as_asked_for_and_as_there_are(chatml, stream):
    assert preview(stream, chatml, 1).count("example 1:") == 1
    assert preview(stream, chatml, 9).count("example 1:") == 2
    assert preview(stream, chatml, 0) == ""


def test_packed_examples_are_shown_apart(chatml, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("one\ntwo\n")
    stream = load_data(DataConfig(str(path), packing=True), chatml, 1, progress=False).train
    assert "row 1, example 1:" in preview(stream, chatml)
    assert "row 1, example 2:" in preview(stream, chatml)


def test_colours_only_when_asked_for(chatml, stream):
    plain, coloured = preview(stream, chatml), preview(stream, chatml, color=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


def test_the_stream_does_not_move(chatml, stream):
    before = stream.state()
    preview(stream, chatml)
    assert stream.state() == before
