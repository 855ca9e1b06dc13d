"""The rules: what counts as the same answer, and what does not."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.evaluation import RULES, gsm8k_answer, viggo_representation

NAMES = st.text("abcdefgh_", min_size=1, max_size=8)
VALUES = st.text("abcXYZ019 :'&/+.()-", max_size=12).map(str.strip)
ATTRIBUTES = st.dictionaries(NAMES, VALUES, max_size=6)
BLANKS = st.sampled_from(["", " ", "  ", "\n"])


def written(function: str, attributes: list[tuple[str, str]], blank: str = "") -> str:
    inside = ",".join(f"{blank}{name}{blank}[{blank}{value}{blank}]{blank}" for name, value in attributes)
    return f"{blank}{function}{blank}({inside}){blank}"


@given(NAMES, ATTRIBUTES, st.randoms(), BLANKS)
def test_viggo_ignores_order_and_blanks(function: str, attributes: dict[str, str], rng: object, blank: str) -> None:
    pairs = list(attributes.items())
    shuffled = list(pairs)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    one = viggo_representation(written(function, pairs))
    assert one is not None
    assert viggo_representation(written(function, shuffled, blank)) == one
    # The one spelling is a representation too, and its own.
    assert viggo_representation(one) == one


@given(NAMES, ATTRIBUTES, NAMES, VALUES)
def test_viggo_sees_every_difference(function: str, attributes: dict[str, str], name: str, value: str) -> None:
    pairs = list(attributes.items())
    one = viggo_representation(written(function, pairs))
    assert viggo_representation(written(function + "x", pairs)) != one
    if name not in attributes:
        assert viggo_representation(written(function, [*pairs, (name, value)])) != one
    for i, (key, held) in enumerate(pairs):
        assert viggo_representation(written(function, pairs[:i] + pairs[i + 1 :])) != one
        assert viggo_representation(written(function, [*pairs[:i], (key, held + "Q"), *pairs[i + 1 :]])) != one


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("f(genres[a, b])", "f(genres[b,a])", True),
        ("f(platforms[a, b, a])", "f(platforms[b, a])", True),
        ("f(player_perspective[a, b])", "f(player_perspective[a])", False),
        ("f(developer[a, b])", "f(developer[b, a])", False),
        ("f(exp_release_date[May 3, 2019])", "f(exp_release_date[May  3, 2019])", True),
        ("f(name[a], name[a])", "f(name[a])", True),
        ("f(name[a], name[b])", "f(name[a])", False),
        ("f(name[a])", "f(name[A])", False),
        ("f(rating[])", "f(rating[ ])", True),
        ("f()", " f ( ) ", True),
    ],
)
def test_viggo_lists_and_values(one: str, other: str, same: bool) -> None:
    read = viggo_representation(one), viggo_representation(other)
    assert None not in read
    assert (read[0] == read[1]) is same


@pytest.mark.parametrize(
    "text",
    ["", "f", "f(name[a]", "f(name[a)", "f(name[a],)", "f(,name[a])", "f(name[a] b[c])", "f(name)", "f(name[a]])",
     "f(name[a]) and more", "say f(name[a])", "f(n[[a]])", "f(name[a]),g(name[b])"],
)  # fmt: skip
def test_viggo_what_is_no_representation(text: str) -> None:
    assert viggo_representation(text) is None
    assert not RULES["viggo"].matches(text, "f(name[a])")


@given(
    st.integers(-(10**12), 10**12),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", ".", ".0", ".00", " dollars", "%"]),
)
def test_gsm8k_the_number_however_it_is_spelled(number: int, commas: bool, dollar: bool, behind: str) -> None:
    spelled = f"{number:,}" if commas else str(number)
    spelled = f"${spelled}" if dollar else spelled
    text = f"5 + 5 = <<5+5=10>>10\n#### {spelled}{behind}"
    assert gsm8k_answer(text) == str(number)
    assert RULES["gsm8k"].matches(text, f"so\n#### {number}")
    assert not RULES["gsm8k"].matches(text, f"so\n#### {number + 1}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("####18", "18"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 0.50", "0.5"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### -0", "0"),
        ("#### 1\n\nQuestion: ... #### 2", "1"),
        ("#### 5\n6", "5"),
        ("18", None),
        ("#### eighteen", None),
        ("#### $", None),
        ("### 18", None),
        ("", None),
    ],
)
def test_gsm8k_answers(text: str, answer: str | None) -> None:
    assert gsm8k_answer(text) == answer


def test_a_response_that_cannot_be_read_is_never_right() -> None:
    assert not RULES["gsm8k"].matches("no idea", "no idea either")


@given(st.text(), BLANKS, BLANKS)
def test_sql_and_text_leave_all_but_the_ends_alone(text: str, before: str, behind: str) -> None:
    for rule in (RULES["sql"], RULES["text"]):
        assert rule.matches(f"{before}{text}{behind}", text)
        assert not rule.matches(f"{text};", text)
        assert not rule.matches(f"a  {text}", f"a {text}") or not text.strip()


def test_every_reference_of_the_real_data_can_be_read(shared: Path) -> None:
    """GSM8K: its authors' own way (no commas) gives the same number. ViGGO: no two unlike references become one."""
    for file in ("train", "test"):
        with gzip.open(shared / "data" / "gsm8k" / f"{file}.jsonl.gz", "rt", encoding="utf-8") as rows:
            answers = [json.loads(row)["answer"] for row in rows]
        assert len(answers) > 1000
        assert [gsm8k_answer(text) for text in answers] == [
            text.split("#### ")[1].replace(",", "").strip() for text in answers
        ]
    with gzip.open(shared / "data" / "viggo" / "test.csv.gz", "rt", encoding="utf-8") as opened:
        references = [row["mr"] for row in csv.DictReader(opened)]
    read = [viggo_representation(text) for text in references]
    assert None not in read
    assert len(set(read)) == len(set(references))
