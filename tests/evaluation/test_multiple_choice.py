"""MMLU: the prompt letter for letter, the subjects' groups, option likelihood against torch, and a short context."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lotaqaf_jax.errors import ConfigError, DataError
from lotaqaf_jax.evaluation import load_mmlu, mmlu, mmlu_prompt
from lotaqaf_jax.evaluation.mmlu_data import GROUPS, LETTERS
from tests.evaluation.conftest import Pair, torch_log_probs

SUBJECTS = ("abstract_algebra", "anatomy", "sociology")


def row(subject: str, number: int, answer: Any) -> dict[str, Any]:
    choices = [str(number), str(number + 1), "none", "x" * (number % 3)]
    return {"subject": subject, "question": f" What is {number}? ", "choices": choices, "answer": answer}


def write_mmlu(folder: Path, questions: int = 4, shots: int = 2, subjects: tuple[str, ...] = SUBJECTS) -> Path:
    """A folder in the form of MMLU; the subjects' questions are mixed, as the hub's need not be in order."""
    rng = np.random.default_rng(0)
    for split, count, start in (("test", questions, 100), ("dev", shots, 0), ("val", shots, 50)):
        rows = [row(subject, start + i, int(rng.integers(4))) for i in range(count) for subject in subjects]
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def test_the_prompt(tmp_path: Path) -> None:
    data = load_mmlu(str(write_mmlu(tmp_path / "mmlu", questions=1, shots=1)), shots=1)
    shown = data.examples["abstract_algebra"]
    shown = (dataclasses.replace(shown[0], answer=2),)
    assert mmlu_prompt(data.questions[0], shown) == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "What is 0?\nA. 0\nB. 1\nC. none\nD. \nAnswer: C\n\n"
        "What is 100?\nA. 100\nB. 101\nC. none\nD. x\nAnswer:"
    )


def test_the_groups_hold_57_subjects_once() -> None:
    subjects = [subject for group in GROUPS.values() for subject in group]
    assert len(subjects) == len(set(subjects)) == 57
    assert {group: len(found) for group, found in GROUPS.items()} == {
        "STEM": 18,
        "humanities": 13,
        "social sciences": 12,
        "other": 14,
    }


def test_the_groups_are_those_of_the_real_data(shared: Path) -> None:
    """Every subject has its group; by the numbers of questions that the benchmark's paper and code give rise to."""
    data = load_mmlu(str(shared / "data" / "mmlu"), shots=5)
    assert len(data.questions) == 14042
    assert {one.subject for one in data.questions} == {subject for group in GROUPS.values() for subject in group}
    assert {len(found) for found in data.examples.values()} == {5}
    assert sorted(file.name for file in data.files) == ["dev.jsonl.gz", "test.jsonl.gz"], "val is not dev"
    sizes = {name: sum(q.subject in subjects for q in data.questions) for name, subjects in GROUPS.items()}
    assert sizes == {"STEM": 3018, "humanities": 4705, "social sciences": 3077, "other": 3242}


def by_torch(pair: Pair, prompt: str) -> np.ndarray:
    """Log-probabilities of " A" to " D" behind a prompt, each by a forward pass of its own."""
    scores = []
    for letter in LETTERS:
        ids = pair.tokenizer(f"{prompt} {letter}").input_ids
        scores.append(torch_log_probs(pair.theirs, ids)[-2, ids[-1]])
    return np.asarray(scores)


def test_letters_as_torch_has_them(pair: Pair, tmp_path: Path) -> None:
    data = load_mmlu(str(write_mmlu(tmp_path / "mmlu", shots=1)), shots=1)
    found = mmlu(pair.ours, pair.tokenizer, data, shots=1, batch_size=3)
    assert [choice.question for choice in found.choices] == list(data.questions)
    correct = []
    for choice in found.choices:
        expected = by_torch(pair, mmlu_prompt(choice.question, data.examples[choice.question.subject]))
        np.testing.assert_allclose(choice.scores, expected, rtol=3e-5, atol=3e-5)
        correct.append(expected.argmax() == choice.question.answer)
    assert 0 < sum(correct) < len(correct)
    assert (found.accuracy.correct, found.accuracy.total) == (sum(correct), 12)
    by_subject = {name: (share.correct, share.total) for name, share in found.subjects.items()}
    assert by_subject == {name: (sum(correct[i::3]), 4) for i, name in enumerate(SUBJECTS)}
    assert {name: share.total for name, share in found.groups.items()} == {
        "STEM": 4,
        "social sciences": 4,
        "other": 4,
    }
    assert found.subject_mean == pytest.approx(sum(correct) / 12)
    records = found.records()
    assert [record["correct"] for record in records] == correct
    assert json.loads(json.dumps(records)) == records


def test_examples_are_dropped_from_the_front_where_the_context_is_short(pair: Pair, tmp_path: Path) -> None:
    """With room for one example of two, the second stays; without room for the question, its beginning goes."""
    data = load_mmlu(str(write_mmlu(tmp_path / "mmlu", questions=1, shots=2, subjects=("sociology",))), shots=2)
    question, examples = data.questions[0], data.examples["sociology"]

    def tokens(prompt: str) -> list[int]:
        return pair.tokenizer(prompt + " A").input_ids[:-1]

    room = len(tokens(mmlu_prompt(question, examples[1:])))
    assert room < len(tokens(mmlu_prompt(question, examples)))
    found = mmlu(pair.ours, pair.tokenizer, data, shots=2, max_length=room)
    expected = by_torch(pair, mmlu_prompt(question, examples[1:]))
    np.testing.assert_allclose(found.choices[0].scores, expected, rtol=3e-5, atol=3e-5)
    assert found.counts["questions_with_fewer_shots"] == found.counts["shots_dropped"] == 1
    assert found.counts["truncated_questions"] == 0

    cut = mmlu(pair.ours, pair.tokenizer, data, shots=2, max_length=20)
    ids = tokens(mmlu_prompt(question, ()))[-20:]
    letters = [pair.tokenizer(f"Answer: {letter}").input_ids[-1] for letter in LETTERS]
    np.testing.assert_allclose(
        cut.choices[0].scores, torch_log_probs(pair.theirs, ids)[-1, letters], rtol=3e-5, atol=3e-5
    )
    assert (cut.counts["shots_dropped"], cut.counts["truncated_questions"]) == (2, 1)


def test_limit_is_of_every_subject(pair: Pair, tmp_path: Path) -> None:
    data = load_mmlu(str(write_mmlu(tmp_path / "mmlu")), shots=0)
    found = mmlu(pair.ours, pair.tokenizer, data, shots=0, limit=1)
    assert [choice.question for choice in found.choices] == list(data.questions[:3])


def test_answers_as_letters_and_one_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row("anatomy", i, answer)) + "\n" for i, answer in enumerate(["D", "b", 2])))
    assert [question.answer for question in load_mmlu(str(file), shots=0).questions] == [3, 1, 2]
    with pytest.raises(DataError, match=r"holds no examples .* --shots 0"):
        load_mmlu(str(file), shots=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, r"test.jsonl, line 1: column 'answer' is 4"),
        ({"answer": None}, r"column 'answer' is None"),
        ({"choices": ["a", "b"]}, r"column 'choices' .* four strings"),
        ({"subject": ""}, r"column 'subject'"),
    ],
)
def test_rows_that_are_not_of_this_form(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(row("anatomy", 1, 1) | change) + "\n")
    with pytest.raises(DataError, match=message):
        load_mmlu(str(tmp_path), shots=0)


def test_too_few_examples_and_settings_out_of_range(pair: Pair, tmp_path: Path) -> None:
    folder = str(write_mmlu(tmp_path / "mmlu", shots=2))
    with pytest.raises(DataError, match="abstract_algebra has 2 questions in dev, expected at least 5"):
        load_mmlu(folder)
    data = load_mmlu(folder, shots=2)
    with pytest.raises(ConfigError, match="max_length: found 257"):
        mmlu(pair.ours, pair.tokenizer, data, shots=2, max_length=257)
    with pytest.raises(DataError, match="2 examples to show, expected 3"):
        mmlu(pair.ours, pair.tokenizer, data, shots=3)


def test_a_tokenizer_without_the_letters_is_refused(pair: Pair, tmp_path: Path) -> None:
    """B and D become the same unknown token."""

    class Deaf:
        bos_token_id = None

        def __call__(self, texts: list[str], verbose: bool = True) -> Any:
            return pair.tokenizer([text.replace("B", "D") for text in texts])

    data = load_mmlu(str(write_mmlu(tmp_path / "mmlu")), shots=0)
    with pytest.raises(DataError, match="expected one token for each letter"):
        mmlu(pair.ours, Deaf(), data, shots=0)  # type: ignore[arg-type]
