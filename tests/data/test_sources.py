"""Names, files and folders become rows; each error names the file and the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lotaqaf_jax.data.formats import Message
from lotaqaf_jax.data.sources import (
    EXTENSIONS,
    PRESETS,
    find_split,
    load_examples,
    load_rows,
    make_examples,
    read_file,
)
from lotaqaf_jax.errors import DataError

ROWS = [
    {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
    {"instruction": 'Say "hi",\nthen, go.', "input": "now", "output": "hi\ngo"},
    {"instruction": "Grüße?", "input": "NA", "output": "None"},
    {"instruction": "Which day?", "input": "007", "output": "2020-01-01"},
]


def encode(extension: str, rows: list[dict[str, str]]) -> bytes:
    """A file's bytes, written by the standard library (Parquet: pyarrow)."""
    if extension == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if extension == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    if extension == ".txt":
        return "".join(row["text"] + "\n" for row in rows).encode()
    if extension == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("extension", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_rows_exactly(tmp_path, extension, gz):
    path = write(tmp_path / f"rows [1]{extension}{gz}", encode(extension, ROWS))
    assert [dict(row.values) for row in read_file(path)] == ROWS


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_a_text_file_is_a_row_per_line_that_is_not_blank(tmp_path, gz):
    path = write(tmp_path / f"a.txt{gz}", "one\n\n  two\x0c\u2028 and\r\n \nthree")
    rows = read_file(path)
    assert [row.values["text"] for row in rows] == ["one", "  two\x0c\u2028 and", "three"]
    assert [row.where for row in rows] == [f"a.txt{gz}, line {line}" for line in (1, 3, 5)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "a": st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
                "b": st.text(st.sampled_from("1.0-NAe ,\"'\n")),
            }
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_value_is_taken_for_a_number_a_date_or_nothing(tmp_path, rows):
    for extension in (".json", ".jsonl", ".csv"):
        path = write(tmp_path / f"rows{extension}", encode(extension, rows))
        assert [dict(row.values) for row in read_file(path)] == rows


def test_json_lines_may_be_in_a_json_file_with_byte_order_mark_and_blank_lines(tmp_path):
    path = write(tmp_path / "a.json", '\ufeff{"text": "x"}\n\n{"text": "y"}\n')
    assert [tuple(row) for row in read_file(path)] == [
        ("a.json, line 1", {"text": "x"}),
        ("a.json, line 3", {"text": "y"}),
    ]


def test_values_of_mixed_types_stay_what_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "1"}\n{"text": 2}\n')
    assert [row.values["text"] for row in read_file(path)] == ["1", 2]


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_local_file_needs_no_network_and_leaves_nothing_behind(tmp_path, monkeypatch, extension):
    import socket
    import tempfile

    import datasets

    addresses = []

    def refuse(host, *args, **kwargs):
        addresses.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = write(tmp_path / f"rows{extension}.gz", encode(extension, ROWS))
    assert len(read_file(path)) == len(ROWS)
    assert not addresses, "a local file must not touch the network"
    assert sorted(tmp_path.iterdir()) == [path, scratch]
    assert not list(scratch.iterdir())


# --- names


@pytest.fixture
def folder(tmp_path) -> Path:
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.jsonl.gz", encode(".jsonl", [{"question": split, "answer": "#### 1"}]))
    write(tmp_path / "README.md", "not data")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "file"), [("train", "train"), ("validation", "valid"), ("val", "valid"), ("test", "test")]
)
def test_a_folder_has_a_file_per_split(folder, split, file):
    assert find_split(folder, split) == [folder / f"{file}.jsonl.gz"]
    assert load_examples(str(folder), split).examples[0].messages[0].content == file


def test_a_file_of_the_splits_own_name_goes_before_those_of_other_names(folder):
    """MMLU has dev, whose questions are shown, beside val; both mean validation where nothing else does."""
    write(folder / "dev.jsonl.gz", encode(".jsonl", [{"question": "dev", "answer": "#### 1"}]))
    assert find_split(folder, "dev") == [folder / "dev.jsonl.gz"]
    assert find_split(folder, "valid") == [folder / "valid.jsonl.gz"]
    assert find_split(folder, "validation") == [folder / "dev.jsonl.gz", folder / "valid.jsonl.gz"]


def test_rows_as_they_are_with_their_files(folder):
    rows = load_rows(f"gsm8k:{folder}", "test")
    assert [row.values["question"] for row in rows.rows] == ["test"]
    assert (rows.files, rows.formats) == ((folder / "test.jsonl.gz",), ("gsm8k",))
    assert make_examples(rows) == load_examples(f"gsm8k:{folder}", "test")


def test_the_shards_of_a_split_are_read_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in (1, 0):
        name = f"train-0000{shard}-of-00002.parquet"
        write(tmp_path / "data" / name, encode(".parquet", [{"text": f"shard {shard}"}]))
    write(tmp_path / "data" / "training_notes.txt.bak", "not data")
    examples = load_examples(str(tmp_path))
    assert [example.text for example in examples.examples] == ["shard 0", "shard 1"]
    assert examples.where[1] == "train-00001-of-00002.parquet, row 1"


def test_the_only_file_of_a_folder_is_its_train_split(tmp_path):
    path = write(tmp_path / "rows.csv", "text\nx\n")
    assert find_split(tmp_path, "train") == [path]
    with pytest.raises(DataError, match=r"no file for split 'test' \(data files: rows.csv\)"):
        find_split(tmp_path, "test")


def test_a_split_in_two_kinds_of_file_is_refused(folder):
    write(folder / "train.csv", "text\nx\n")
    with pytest.raises(DataError, match="split 'train' in more than one kind"):
        load_examples(str(folder))


@pytest.mark.parametrize("target", ["folder", "file"])
def test_a_preset_takes_a_local_folder_or_file(folder, target):
    path = folder if target == "folder" else folder / "test.jsonl.gz"
    examples = load_examples(f"gsm8k:{path}", "test")
    assert examples.format == "gsm8k"
    assert examples.examples[0].messages == (Message("user", "test"), Message("assistant", "#### 1"))


def test_a_preset_refuses_other_columns(folder):
    with pytest.raises(DataError, match=r"viggo:.*: unknown columns answer, question; expected .*viggo: mr, ref"):
        load_examples(f"viggo:{folder}")


def test_both_editions_of_sql_give_the_same_prompt(tmp_path):
    fields = {
        "question": "How many?",
        "context": "CREATE TABLE t (a INTEGER)",
        "answer": "SELECT COUNT(*) FROM t",
    }
    prompt = (
        "Write a SQL query to answer the question based on the table schema.\n\n"
        " context: CREATE TABLE t (a INTEGER)\n\n question: How many?"
    )
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": fields["answer"]}]
    by_fields = write(tmp_path / "fields.jsonl", json.dumps(fields))
    by_messages = write(tmp_path / "messages.jsonl", json.dumps({"messages": chat}))
    assert load_examples(f"sql:{by_fields}").examples == load_examples(f"sql:{by_messages}").examples


@pytest.mark.parametrize(
    ("dataset", "asked"),
    [
        ("alpaca", ("yahma/alpaca-cleaned", None)),
        ("gsm8k", ("openai/gsm8k", "main")),
        ("sql", ("b-mc2/sql-create-context", None)),
        ("viggo", ("GEM/viggo", None)),
        ("someone/stories", ("someone/stories", None)),
        ("someone/stories:small", ("someone/stories", "small")),
    ],
)
def test_a_hub_name_or_preset_is_asked_of_the_hub(monkeypatch, dataset, asked):
    import datasets

    calls = []

    def load_dataset(name, subset, *, split, revision):
        calls.append((name, subset, split))
        columns = {
            "gsm8k": {"question": ["a", "b"], "answer": ["1", "2"]},
            "viggo": {"meaning_representation": ["a", "b"], "target": ["1", "2"]},
            "sql-create-context": {"question": ["a", "b"], "context": ["c", "d"], "answer": ["1", "2"]},
            "alpaca-cleaned": {"instruction": ["a", "b"], "output": ["1", "2"]},
        }
        return datasets.Dataset.from_dict(columns.get(name.split("/")[1], {"text": ["a", "b"]}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_examples(dataset, "test", max_samples=1)
    assert calls == [(*asked, "test")]
    assert len(examples.examples) == 1
    assert examples.where == (f"{asked[0]} test, row 1",)


@pytest.mark.parametrize(("dataset", "instead"), [("gsm8k", "gsm8k:PATH"), ("someone/stories", "PATH")])
def test_without_a_network_a_hub_name_says_what_to_give_instead(monkeypatch, dataset, instead):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"cannot be had.*Without a network, give local data: {instead}, where"):
        load_examples(dataset)


# --- errors


@pytest.mark.parametrize("dataset", ["nowhere/rows.jsonl", "/nowhere/at/all", "./nowhere", "rows", "gsm8k:nowhere"])
def test_what_is_not_there_is_named(dataset):
    with pytest.raises(DataError, match=r"nowhere|'rows' is not a file"):
        load_examples(dataset)


def test_an_unknown_preset_is_named_with_those_known(tmp_path):
    with pytest.raises(DataError, match=f"unknown preset 'squl'.*known are {', '.join(PRESETS)}"):
        load_examples(f"squl:{tmp_path}")


@pytest.mark.parametrize("name", ["a.xlsx", "a.txt.zip", "gz"])
def test_an_unknown_extension_is_named_with_those_known(tmp_path, name):
    path = write(tmp_path / name, "x")
    with pytest.raises(DataError, match=f"{name}' has an extension that cannot be read; known are .json, .jsonl"):
        load_examples(str(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n\n{"text": }\n',
            r"a.jsonl, line 3: invalid JSON, Expecting value \(column 10\)",
        ),
        ("a.jsonl.gz", '{"text": "x"\n', r"a.jsonl.gz, line 1: invalid JSON"),
        ("a.jsonl", '{"text": "x"}\n[1, 2]\n', "a.jsonl, line 2: found list; expected an object"),
        ("a.json", '[{"text": "x"},\n {"text" "y"}]', "a.json, line 2: invalid JSON"),
        ("a.json", '[{"text": "x"}, "y"]', "a.json, row 2: found str; expected an object"),
        ("a.csv", "text,b\nx,1\ny,2,3\n", "'a.csv' cannot be read as CSV: .*line 3"),
        ("a.parquet", "not parquet", "'a.parquet' cannot be read as Parquet"),
        ("a.txt", b"\xff\xfe\xff", "'a.txt' cannot be read as text"),
        (
            "a.jsonl",
            '{"instruction": "x", "output": "y"}\n{"instruction": "x"}',
            "a.jsonl, line 2: column 'output'",
        ),
        ("a.csv", "instruction,output\nx,y\nz\n", "a.csv, row 2: column 'output' is empty"),
        ("a.csv", "title,body\nx,y\n", "a.csv: unknown columns body, title"),
    ],
)
def test_a_bad_file_or_row_is_named_with_its_place(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=message):
        load_examples(str(path))


@pytest.mark.parametrize("damage", ["not gzip", "cut short"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"plain text" if damage == "not gzip" else gzip.compress(b"x" * 1000)[:-12])
    with pytest.raises(DataError, match=r"a.jsonl.gz' is not a whole gzip file"):
        load_examples(str(path))


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("blank", ["", "\n"])
def test_a_dataset_without_rows_is_named(tmp_path, extension, blank):
    empty = {".csv": f"text\n{blank}", ".json": f"[]{blank}", ".parquet": encode(".parquet", [])}
    path = write(tmp_path / f"a{extension}", empty.get(extension, blank))
    with pytest.raises(DataError, match="no rows"):
        load_examples(str(path))


def test_max_samples_takes_the_first_rows(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\nthree\n")
    assert [example.text for example in load_examples(str(path), max_samples=2).examples] == ["one", "two"]
    assert len(load_examples(str(path), max_samples=9).examples) == 3


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path):
    path = write(tmp_path / "a.csv", "instruction,output,id\nx,y,1\nx,,2\nz,w,3\n")
    with pytest.raises(DataError, match=r"a.csv, row 2: column 'output' is empty.*skip_bad_rows"):
        load_examples(str(path))
    examples = load_examples(str(path), skip_bad_rows=True)
    assert examples.where == ("a.csv, row 1", "a.csv, row 3")
    assert len(examples.skipped) == 1
    assert examples.skipped[0].startswith("a.csv, row 2: column 'output' is empty")
    assert examples.ignored_columns == ("id",)


def test_only_bad_rows_are_an_error_even_when_they_may_be_left_out(tmp_path):
    path = write(tmp_path / "a.csv", "instruction,output\nx,\n")
    with pytest.raises(DataError, match=r"none of the 1 rows can be used; the first: a.csv, row 1"):
        load_examples(str(path), skip_bad_rows=True)


# --- the real files


@pytest.mark.parametrize(
    ("dataset", "split", "format", "rows"),
    [
        ("gsm8k", "test", "gsm8k", 1319),
        ("viggo", "train", "viggo", 5103),
        ("viggo", "validation", "viggo", 714),
        ("sql", "validation", "messages", 1000),
        ("alpaca/alpaca_2k.jsonl.gz", "train", "alpaca", 1975),
        ("alpaca/instruction_data_1100.jsonl.gz", "train", "alpaca", 1100),
        ("text/c4_demo.jsonl.gz", "train", "text", 300),
    ],
)
def test_the_real_files_load_with_and_without_their_preset(shared, dataset, split, format, rows):
    path = str(shared / "data" / dataset)
    examples = load_examples(path, split)
    assert (examples.format, len(examples.examples)) == (format, rows)
    preset = dataset.split("/")[0]
    if preset in PRESETS:
        assert load_examples(f"{preset}:{path}", split).examples == examples.examples
