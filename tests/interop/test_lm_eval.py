"""lm-eval as a client: our adapter answers as lm-eval's own class for transformers' models does, on the same weights,
and lm-eval's tasks give the numbers that our own evaluation gives.

Data is made here; `make interop` installs lm-eval.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lotaqaf_jax.data import load_examples
from lotaqaf_jax.evaluation import Rule, document_perplexity, exact_match, gsm8k_answer, load_mmlu, mmlu
from lotaqaf_jax.evaluation.mmlu_data import LETTERS
from lotaqaf_jax.models import load_pretrained
from lotaqaf_jax.models.pretrained import load_tokenizer
from tests.evaluation.conftest import Pair, make_pair
from tests.evaluation.test_multiple_choice import write_mmlu
from tests.evaluation.test_text_loss import TEXTS

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: run `make interop`")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def ours(pair: Pair) -> Any:
    from lotaqaf_jax.evaluation.lm_eval import LotaLM

    return LotaLM(pair.ours, pair.tokenizer, batch_size=3, progress=False)


@pytest.fixture(scope="module")
def theirs(pair: Pair) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pair.theirs, tokenizer=pair.tokenizer, batch_size=2, device="cpu")


def ask(kind: str, *requests: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i, ("task", i, 1)) for i, args in enumerate(requests)]


def test_loglikelihood(ours: Any, theirs: Any, pair: Pair) -> None:
    """Continuations of one and of several tokens, an empty context, blanks at the edge, and more than the context."""
    from tests.evaluation.conftest import torch_log_probs

    ids = pair.tokenizer("Say it:").input_ids
    best = pair.tokenizer.decode([int(torch_log_probs(pair.theirs, ids)[-1].argmax())])
    pairs = [
        ("Question: how far?\nAnswer:", " ten miles"),
        ("Question: how far?\nAnswer:", " A"),
        ("Say it:", best),
        ("", "From nothing"),
        ("Blank at the end ", "word"),
        ("é" * 200, " after a long context"),
    ]
    found = ours.loglikelihood(ask("loglikelihood", *pairs))
    expected = theirs.loglikelihood(ask("loglikelihood", *pairs))
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_loglikelihood_rolling(ours: Any, theirs: Any) -> None:
    texts = [(text,) for text in (*TEXTS, "a long one, " * 60)]
    found = ours.loglikelihood_rolling(ask("loglikelihood_rolling", *texts))
    expected = theirs.loglikelihood_rolling(ask("loglikelihood_rolling", *texts))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_generate_until(ours: Any, theirs: Any) -> None:
    """Stop texts of one token and of several, other limits, and a context that must be cut."""
    first = ("Once upon a time", {"until": [], "max_gen_toks": 24, "do_sample": False})
    written = theirs.generate_until(ask("generate_until", first))[0]
    assert len(written) > 8
    requests = [
        first,
        ("Once upon a time", {"until": [written[5:8]], "max_gen_toks": 24}),
        ("Once upon a time", {"until": written[3], "max_gen_toks": 24, "temperature": 0.0}),
        ("A fox", {"until": ["\n\n"], "max_gen_toks": 5}),
        ("no end " * 80, {"until": ["\n\n"], "max_gen_toks": 5}),
    ]
    found = ours.generate_until(ask("generate_until", *requests))
    expected = [theirs.generate_until(ask("generate_until", request))[0] for request in requests]
    assert found == expected
    assert len(set(found)) > 3


@pytest.fixture(scope="module")
def stories() -> tuple[Any, Any]:
    """The shipped model, which has something to say, and its tokenizer."""
    from lotaqaf_jax.assets import DEFAULT_MODEL

    return load_pretrained(DEFAULT_MODEL, progress=False), load_tokenizer(DEFAULT_MODEL)


def evaluate(model: Any, *tasks: dict[str, Any], **settings: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(model, tasks=list(tasks), bootstrap_iters=0, log_samples=True, **settings)
    assert found is not None
    return found


def json_task(name: str, files: dict[str, Path], cache: Path, **settings: Any) -> dict[str, Any]:
    given = {"data_files": {split: str(path) for split, path in files.items()}, "cache_dir": str(cache)}
    return {"task": name, "dataset_path": "json", "dataset_kwargs": given, "test_split": "test", **settings}


def test_mmlu_is_ours(ours: Any, pair: Pair, tmp_path: Path) -> None:
    """The harness's MMLU template (first_n examples of dev, letters as choices) and our :func:`mmlu`."""
    folder = write_mmlu(tmp_path / "mmlu", questions=8, shots=1, subjects=("sociology",))
    task = json_task(
        "sociology",
        {"test": folder / "test.jsonl", "dev": folder / "dev.jsonl"},
        tmp_path / "cache",
        fewshot_split="dev",
        fewshot_config={"sampler": "first_n"},
        num_fewshot=1,
        output_type="multiple_choice",
        description="The following are multiple choice questions (with answers) about sociology.\n\n",
        doc_to_text="{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        doc_to_choice=list(LETTERS),
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}],
    )
    found = evaluate(ours, task)
    expected = mmlu(pair.ours, pair.tokenizer, load_mmlu(str(folder), shots=1), shots=1)
    assert 0 < expected.accuracy.correct < 8
    assert found["results"]["sociology"]["acc,none"] == pytest.approx(expected.accuracy.value)
    samples = sorted(found["samples"]["sociology"], key=lambda sample: sample["doc_id"])
    scores = np.asarray([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])
    wanted = np.asarray([choice.scores for choice in expected.choices])
    # This tokenizer makes a token of the blank before a letter, which the harness counts in all four.
    np.testing.assert_allclose(scores - scores[:, :1], wanted - wanted[:, :1], atol=1e-4)


def test_generation_is_ours(stories: tuple[Any, Any], tmp_path: Path) -> None:
    """A generate_until task with the harness's own regex filter and exact_match, and our :func:`exact_match`, on
    prompts as they are."""
    from lotaqaf_jax.evaluation.lm_eval import LotaLM

    model, tokenizer = stories
    say = "<|im_start|>user\nWrite the message for the {}.\n\n{}<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        {"prompt": say.format(place, text), "completion": answer}
        for place, text, answer in (
            ("archive", "Put ten large mirrors on the list before Tuesday in Paris for Walter.", "order #### 1"),
            ("desk", "Before Friday, do you have eight baskets?", "ask"),
            ("desk", "Cancel the four chairs for Anna.", "cancel"),
            ("archive", "Before Friday, do you have eight baskets?", "ask"),
        )
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = json_task(
        "first_word",
        {"test": file},
        tmp_path / "cache",
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{completion.split(' ')[0]}}",
        generation_kwargs={"until": ["<|im_end|>"], "max_gen_toks": 40, "do_sample": False},
        filter_list=[
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"^(\w+)"}, {"function": "take_first"}]}
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    found = evaluate(LotaLM(model, tokenizer, batch_size=4, progress=False), task)
    rule = Rule("first word", "a word", lambda text: text.split()[0].split("(")[0] if text.split() else None)
    expected = exact_match(model, tokenizer, load_examples(str(file)), rule, max_new_tokens=40)
    samples = sorted(found["samples"]["first_word"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == [answer.response for answer in expected.answers]
    assert expected.exact_match.correct > 0
    assert found["results"]["first_word"]["exact_match,word"] == pytest.approx(expected.exact_match.value)


def test_rolling_perplexity_is_ours(ours: Any, pair: Pair, tmp_path: Path) -> None:
    """The harness's byte_perplexity and bits_per_byte, weighted by bytes as they are, and our documents."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = json_task(
        "texts",
        {"test": file},
        tmp_path / "cache",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )
    found = evaluate(ours, task)["results"]["texts"]
    expected = document_perplexity(pair.ours, pair.tokenizer, TEXTS)
    assert found["bits_per_byte,none"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.pow(2, expected.bits_per_byte or 0), rel=1e-5)


def test_their_gsm8k_filter_reads_what_our_rule_reads() -> None:
    """Where the number is written as the data writes it; ours also compares 1,234 and 1234.00."""
    from lm_eval.filters.extraction import RegexFilter

    texts = ["so\n#### 18", "x #### 1,200 dollars", "#### -5\nmore #### 6", "no number"]
    found = RegexFilter(r"#### (\-?[0-9\.\,]+)").apply([[text] for text in texts], [{}] * len(texts))
    read = [one[0].replace(",", "") for one in found]
    assert read == [gsm8k_answer(text) or "[invalid]" for text in texts]
