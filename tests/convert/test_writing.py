"""Folders appear whole or not at all."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.writing import TensorFile, clear_leftovers, new_folder, write_safetensors
from lotaqaf_jax.errors import ConfigError, OutputError
from lotaqaf_jax.quant.folder import read_header


def fill(folder: Path, text: str = "{}") -> None:
    (folder / "config.json").write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "weights").write_bytes(b"1")


def fill_and_fail(target: Path, problem: BaseException) -> None:
    with new_folder(target, overwrite=True) as folder:
        fill(folder, "new")
        raise problem


def test_appears_with_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as folder:
        fill(folder)
        assert not target.exists()
    assert (target / "inner" / "weights").read_bytes() == b"1"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path: Path, kind: type[BaseException]) -> None:
    target = tmp_path / "out"
    with new_folder(target) as folder:
        fill(folder, "old")
    with pytest.raises(kind):
        fill_and_fail(target, kind())
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_all_of_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as folder:
        fill(folder, "old")
    with new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_folder_not_empty(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty \(1 entries, the first thesis.txt\).*--overwrite"):
        new_folder(tmp_path).__enter__()
    with pytest.raises(ConfigError, match="was not written by this"):
        new_folder(tmp_path, overwrite=True).__enter__()
    with pytest.raises(ConfigError, match="found a file"):
        new_folder(tmp_path / "thesis.txt").__enter__()


@pytest.mark.parametrize("output", ["base", "base/inside", "."])
def test_never_into_what_is_read(tmp_path: Path, output: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is, holds or lies in"):
        new_folder(tmp_path / output, overwrite=True, sources=[tmp_path / "base"]).__enter__()


@pytest.mark.parametrize(("code", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied")])
def test_disk_full_while_writing(tmp_path: Path, code: int, says: str) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match=f"{target}: could not be written: {says}"):
        fill_and_fail(target, OSError(code, "Permission denied"))
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="the disk is full"), new_folder(tmp_path / "out") as folder:
        fill(folder)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"1e\+09 GB are needed there, .* GB are free"):
        new_folder(tmp_path / "out", needed=10**18).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_parent_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        new_folder(tmp_path / "file" / "out").__enter__()


TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, np.uint8]


@settings(deadline=None)  # the first example imports torch
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 5), max_size=3).map(tuple)), min_size=1, max_size=6
    )
)
def test_safetensors_are_those_of_the_library(
    shapes: list[tuple[type, tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("torch")  # NumPy's reader of the library has no bfloat16.
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.integers(0, 100, shape).astype(kind) for i, (kind, shape) in enumerate(shapes)}
    write_safetensors(path, {k: (v.dtype, v.shape) for k, v in arrays.items()}, arrays.__getitem__, {"format": "pt"})
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name).float().numpy(), array.astype(np.float32))
    for entry in read_header(path).values():
        assert entry.start % entry.dtype.itemsize == 0


def test_tensors_may_come_in_any_order_but_all_must_come(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.int32).reshape(2, 3),
        "a": np.arange(5, dtype=np.int8),
        "c": np.float16([1, 2]),
    }
    tensors = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(tmp_path / "in order", tensors, arrays.__getitem__)
    for order in itertools.permutations(arrays):
        with TensorFile(tmp_path / "x", tensors) as file:
            for name in order:
                file.write(name, arrays[name])
        assert (tmp_path / "x").read_bytes() == (tmp_path / "in order").read_bytes()
    file = TensorFile(tmp_path / "y", tensors)
    file.write("b", arrays["b"])
    file.write("c", arrays["c"])
    with pytest.raises(ValueError, match="1 tensors were not written, the first a"):
        file.__exit__(None)
    with pytest.raises(KeyboardInterrupt), TensorFile(tmp_path / "z", tensors):  # not hidden by what is missing
        raise KeyboardInterrupt


def test_safetensors_hold_what_was_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: found float64"):
        write_safetensors(tmp_path / "x", {"a": (np.float32, (2,))}, lambda _: np.zeros(2))


def left_by_a_kill(tmp_path: Path, *names: str) -> None:
    """Folders as a process has left them that was killed: without a lock."""
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)


def test_leftovers_of_killed_processes_are_cleared_and_no_others(tmp_path: Path) -> None:
    left_by_a_kill(
        tmp_path, ".out.partial-dead", ".out.old-dead2", "out", ".other.partial-dead", ".output.partial-dead"
    )
    with new_folder(tmp_path / "out", overwrite=True) as alive:
        fill(alive)
        clear_leftovers(tmp_path / "out")
        assert alive.exists()
        assert {path.name for path in tmp_path.iterdir()} == {
            *("out", alive.name, ".other.partial-dead", ".output.partial-dead")
        }
    assert (tmp_path / "out" / "inner").exists()


def test_what_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    """A kill between the two renames: the old folder is aside, and the new one is not in its place."""
    left_by_a_kill(tmp_path, ".out.partial-dead", ".out.old-dead")
    clear_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == ".out.old-dead"
    with pytest.raises(ConfigError, match="not empty"):
        new_folder(tmp_path / "out").__enter__()
