"""Calibration text becomes samples by the rule that convert.calibration states."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from convert.calibration import calibration_samples, check_samples
from lotaqaf_jax.errors import ConfigError, DataError
from tests.data.conftest import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(bos="<s>", add_bos=True)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def test_documents_are_shuffled_joined_and_cut(tmp_path: Path) -> None:
    """Every window is a piece of some order of <s> document </s>, and none is used twice."""
    texts = [chr(97 + i) * (i + 1) for i in range(20)]  # a, bb, ccc, ...: a token tells of its document
    path = lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    total = sum(len(text) + 2 for text in texts)
    with pytest.warns(UserWarning, match=rf"{total} tokens make {total // 16} samples of 16 tokens, not 1000"):
        samples = calibration_samples(path, TOKENIZER, samples=1000, length=16)
    assert len(samples) == total // 16
    stream = np.concatenate(samples)
    documents = [list(part) for part in np.split(stream, np.flatnonzero(stream == BOS)) if len(part)]
    whole = {(BOS, *ids(text), EOS) for text in texts}
    # Nothing is left out but the end, so all but the last document are whole, and each comes once.
    assert all(tuple(document) in whole for document in documents[:-1])
    assert len({tuple(document) for document in documents}) == len(documents)
    assert [tuple(d) for d in documents[:-1]] != sorted(tuple(d) for d in documents[:-1])


def test_the_seed_decides(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": f"{i} " * 30} for i in range(600)])

    def draw(seed: int) -> list[list[int]]:
        return [s.tolist() for s in calibration_samples(path, TOKENIZER, samples=8, length=16, seed=seed)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert all(len(sample) == 16 for sample in draw(0))


def test_a_text_file_is_one_document_with_windows_drawn_all_over_it(tmp_path: Path) -> None:
    text = "\n\n".join(f"line {i}" for i in range(400))
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    samples = calibration_samples(path, TOKENIZER, samples=20, length=32)
    stream = np.array([BOS, *ids(text), EOS])
    windows = stream[: len(stream) // 32 * 32].reshape(-1, 32)
    places = [int(np.flatnonzero((windows == sample).all(axis=1))[0]) for sample in samples]
    assert len(set(places)) == 20
    assert max(places) > len(windows) // 2  # not only the beginning


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>", special=("<|im_start|>",))
    path = lines(tmp_path / "rows.jsonl", [{"instruction": "say a", "output": "a"}] * 3)
    (sample,) = calibration_samples(path, tokenizer, samples=1, length=100)
    assert tokenizer.decode(sample).startswith("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nsay a")


def test_unusable_text_is_named(tmp_path: Path) -> None:
    short = lines(tmp_path / "short.jsonl", [{"text": "abc"}])
    with pytest.raises(DataError, match="holds 5 tokens, fewer than one sample of 6"):
        calibration_samples(short, TOKENIZER, samples=1, length=6)
    with pytest.raises(DataError, match="no such file"):
        calibration_samples(tmp_path / "none.txt", TOKENIZER, samples=1, length=6)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt: is empty"):
        calibration_samples(tmp_path / "empty.txt", TOKENIZER, samples=1, length=6)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"abc" * 100)[:20])
    with pytest.raises(DataError, match="cannot be read as text"):
        calibration_samples(tmp_path / "cut.txt.gz", TOKENIZER, samples=1, length=6)
    for flag, samples, length in (("--samples", 0, 6), ("--length", 1, 0)):
        with pytest.raises(ConfigError, match=f"{flag}: found 0"):
            calibration_samples(short, TOKENIZER, samples=samples, length=length)


def test_samples_are_checked_against_the_model() -> None:
    good = check_samples([[1, 2, 3], np.array([4], np.int64)], vocab_size=5, longest=3)
    assert [(sample.dtype, sample.tolist()) for sample in good] == [(np.int32, [1, 2, 3]), (np.int32, [4])]
    with pytest.raises(DataError, match="no samples"):
        check_samples([], 5, 3)
    with pytest.raises(DataError, match="sample 1 holds token 5, the model knows 0 to 4"):
        check_samples([[1], [5]], 5, 3)
    with pytest.raises(DataError, match="holds token -1"):
        check_samples([[-1]], 5, 3)
    with pytest.raises(DataError, match="sample 0 has 4 tokens, the model has 3 positions"):
        check_samples([[1, 1, 1, 1]], 5, 3)
    for bad in ([], [0.5], [[1, 2]]):
        with pytest.raises(DataError, match="sample 0 is"):
            check_samples([bad], 5, 3)
