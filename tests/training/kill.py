"""Runs of train.py in processes of their own that are killed, again and again, while they start, step, save and export,
or whose disk is full.

    python -m tests.training.kill FOLDER KILLS SEED      prints what happened as one line of JSON
    python -m tests.training.kill FOLDER                 the same of runs with a full disk

This process imports all that a run needs and starts no device, which would start threads: every run is a fork of it,
which spares it the imports.
FOLDER holds ``model/`` and ``rows.jsonl``, and gets a folder for each run, in which the run works. JAX is to keep what
it compiles in ``compiled/``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import train
from lotaqaf_jax.models.pretrained import load_tokenizer
from lotaqaf_jax.training.checkpoints import saved_steps

STEPS = 6
LIMIT = 2
FLAGS = [
    *("--model", "../model", "--dataset", "../rows.jsonl", "--output_dir", "output", "--val_size", "4"),
    *("--max_seq_length", "32", "--per_device_train_batch_size", "4", "--lora_r", "4", "--moved", "0.1"),
    *("--offset", "reference", "--target_modules", "down_proj", "--max_steps", str(STEPS), "--eval_steps", "4"),
    *("--save_steps", "1", "--save_total_limit", str(LIMIT), "--resume_from_checkpoint", "auto"),
]
"""One command line, for the first start and for every other."""

PHASES = ("starting", "stepping", "saving", "exporting", "verifying", "finishing")
_LATER = ("orbax.checkpoint.experimental.v1", "grain", "datasets", "matplotlib.pyplot", "convert.save")


def import_all(model: Path) -> None:
    """What a run imports only when it comes to it."""
    for name in _LATER:
        importlib.import_module(name)
    load_tokenizer(str(model))
    gc.freeze()  # What is here stays, and need not be looked at, and so be copied, in every fork.


# A run, and what is seen of it from outside


@dataclasses.dataclass(frozen=True)
class Trap:
    """Where a run is to kill itself: before the n-th operation on files of the output that ``pattern`` fits."""

    pattern: str
    n: int

    def set(self) -> None:
        """In the process that is to be killed."""
        left, pattern = [self.n], re.compile(self.pattern)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            operation = _operation(event, arguments)
            if operation is not None and pattern.search(operation):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def _operation(event: str, arguments: tuple[Any, ...]) -> str | None:
    """An operation on a file of the output as a word and its path; None for anything else."""
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        return None
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    if "output" not in Path(path).parts:
        return None
    reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return f"{'read' if reads else event} {path}"


def start(place: Path, flags: list[str] = FLAGS, trap: Trap | None = None) -> int:
    """Fork a run that works in ``place``; gives its process id. What it says goes to ``place/said.txt``."""

    def work() -> int:
        signal.alarm(300)  # Ends one that hangs, which the test then hears of.
        said = os.open(place / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(place)
        if trap is not None:
            trap.set()
        return train.main(flags)

    return forked(work)


def forked(work: Callable[[], int]) -> int:
    """The id of a new process, which ends with the status that ``work`` gives, or 70 where it raises."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
    raise AssertionError("not reached")


def ended(process: int) -> int | None:
    """The exit status of a run, negative if a signal ended it; None while it is there."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(process: int) -> int:
    """The exit status of a run, when it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class View:
    """The output of a run as files show it, compared with how it was when the run was started."""

    def __init__(self, place: Path) -> None:
        self.output = place / "output"
        # A second name, so that the file's number is not given to another one.
        (place / "log").unlink(missing_ok=True)
        if (self.output / "trainer_log.jsonl").exists():
            os.link(self.output / "trainer_log.jsonl", place / "log")
        self._log, self._merged = self._number("trainer_log.jsonl"), self._number("merged")
        self._adapter = self._number("adapter")
        self._hidden = set(self._hidden_folders())

    def _number(self, name: str) -> int | None:
        try:
            return (self.output / name).stat().st_ino
        except FileNotFoundError:
            return None

    def _hidden_folders(self) -> list[Path]:
        return [Path(entry) for entry in _listing(self.output) if entry.name.startswith(".")]

    def lines(self) -> int:
        """Whole lines that the log has, 0 if it is the one that was there before."""
        if self._number("trainer_log.jsonl") in (None, self._log):
            return 0
        return (self.output / "trainer_log.jsonl").read_bytes().count(b"\n")

    def stepping(self) -> bool:
        """Whether the run has come to its loop."""
        return self._number("trainer_log.jsonl") not in (None, self._log)

    def saving(self) -> bool:
        """Whether a checkpoint is being written, or an old one removed."""
        names = [entry.name for entry in _listing(self.output / "checkpoints")]
        partial = [int(name.partition(".")[0]) for name in names if name.endswith("-tmp")]
        # What an earlier run left is of a step that this one has not come to.
        ours = any(step <= self._last_step() for step in partial)
        return self.stepping() and (ours or sum(name.isdecimal() for name in names) > LIMIT)

    def _last_step(self) -> int:
        records = read_log(self.output)
        return records[-1]["step"] if records else 0

    def partial(self, name: str) -> Path | None:
        """The folder that becomes ``name``, if this run is writing it."""
        ours = [path for path in self._hidden_folders() if path not in self._hidden]
        return next((path for path in ours if path.name.startswith(f".{name}.partial-")), None)

    def phase(self) -> str:
        """What the run is doing, or did last."""
        merged = self.partial("merged")
        if merged is not None:
            # Written last, before the folder is opened again.
            return "verifying" if (merged / "offset_adapter" / "adapter_config.json").exists() else "exporting"
        if self._number("merged") not in (None, self._merged):
            return "finishing"
        if self.partial("adapter") is not None or self._number("adapter") not in (None, self._adapter):
            return "exporting"
        if self.saving():
            return "saving"
        return "stepping" if self.stepping() else "starting"


def _listing(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        yield from list(os.scandir(folder))
    except FileNotFoundError:
        return


def read_log(output: Path) -> list[dict[str, Any]]:
    """The log without its times, and without a last line that was cut off."""
    path = output / "trainer_log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def exported(output: Path) -> dict[str, bytes]:
    """The files of adapter and merged model."""
    files = [path for name in ("adapter", "merged") for path in (output / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(files)}


def names(output: Path) -> list[str]:
    """What lies in the output and among its checkpoints."""
    found = [*output.iterdir(), *(output / "checkpoints").iterdir()]
    return sorted(str(path.relative_to(output)) for path in found)


def compare(output: Path, whole: Path) -> None:
    """A run that was killed has left what one that was not has left.

    Raises:
        AssertionError: it has not.
    """
    assert read_log(output) == read_log(whole)
    ours, theirs = exported(output), exported(whole)
    assert ours.keys() == theirs.keys()
    differing = [name for name in theirs if ours[name] != theirs[name]]
    assert not differing, f"{differing[0]}: {ours[differing[0]][-2000:]!r}, expected {theirs[differing[0]][-2000:]!r}"
    assert names(output) == names(whole)


# How runs are killed


@dataclasses.dataclass(frozen=True)
class Aim:
    """A kill to be made: at a trap; or ``delay`` seconds after ``seen`` is first true."""

    trap: Trap | None = None
    seen: Callable[[View], bool] = lambda view: True
    delay: float = 0.0


def aims(random: random.Random) -> list[Aim]:
    """The kills of one run's life, in an order in which each can be reached from where the one before left it."""

    def trap(pattern: str, most: int) -> Aim:
        return Aim(trap=Trap(pattern, random.randint(1, most)))

    def after(seen: Callable[[View], bool], most: float) -> Aim:
        return Aim(seen=seen, delay=random.uniform(0, most))

    def at(seen: Callable[[View], bool]) -> Callable[[View], bool]:
        # Lines that were kept count too: where there are more, it is any step.
        count = random.randint(1, STEPS)
        return lambda view: seen(view) and view.lines() >= count

    start = [trap(r"", 12), after(lambda view: True, 0.7), after(View.stepping, 0.8)]
    random.shuffle(start)
    save = [
        after(at(View.stepping), 0.04),
        trap(r"orbax-checkpoint-tmp", 60),
        after(at(View.saving), 0.01),
        trap(r"(rename|rmtree|mkdir) .*/checkpoints/", 8),
        after(at(View.saving), 0.04),
    ]
    random.shuffle(save)
    export = [
        trap(r"\.adapter\.partial-|rename .*adapter", 6),
        after(lambda view: view.partial("merged") is not None, 0.01),
        trap(r"(open|mkdir) .*\.merged\.partial-", 8),
        trap(r"read .*\.merged\.partial-.*/model.safetensors|rename .*merged", 8),
        after(lambda view: view.phase() == "verifying", 0.4),
    ]
    random.shuffle(export)
    return [*start, *save, *export, after(lambda view: view.phase() == "finishing", 0.05)]


def run_and_kill(place: Path, aim: Aim) -> tuple[int, str]:
    """Start a run and kill it; gives its exit status (0 if it came to its end before) and the phase it was in."""
    view = View(place)
    process = start(place, trap=aim.trap)
    if aim.trap is not None:
        return wait(process), view.phase()
    due: float | None = None
    while (status := ended(process)) is None:
        if due is None and aim.seen(view):
            due = time.monotonic() + aim.delay
        if due is not None and time.monotonic() >= due:
            os.kill(process, signal.SIGKILL)  # It is ours, and still there or not yet waited for.
            return wait(process), view.phase()
        time.sleep(0.001)
    return status, view.phase()


def check_between(place: Path, whole: list[dict[str, Any]], before: list[int]) -> None:
    """What holds however a run was killed: the last good checkpoint is there, and the log is a beginning of the log.

    Raises:
        AssertionError: it does not.
    """
    after = saved_steps(place / "output" / "checkpoints")
    assert not before or max(after, default=0) >= max(before), f"checkpoints {before} became {after}"
    log = read_log(place / "output")
    assert log == whole[: len(log)], "the log is not a beginning of the whole log"


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs until there were ``kills``, and every phase was struck; then let the last one come to its end.

    Returns:
        "kills", how many there were; "phases", how many in each; "runs", how many came to their end and were compared.

    Raises:
        AssertionError: a run left something else than one that was never killed.
    """
    generator = random.Random(seed)
    whole = run_whole(folder)
    log, programs = read_log(whole / "output"), compiled(folder)
    phases: Counter[str] = Counter()
    runs = 0
    while phases.total() < kills or any(phases[phase] < 3 for phase in PHASES):
        runs += 1
        assert runs <= kills, f"the aims miss: {phases}"
        place = folder / f"run{runs}"
        place.mkdir()
        # The last start has no aim, and ends.
        for aim in [*aims(generator), None]:
            before = saved_steps(place / "output" / "checkpoints")
            status, phase = run_and_kill(place, aim) if aim is not None else (wait(start(place)), "")
            print(f"run {runs}: {aim} -> {status} {phase}, checkpoints {before}", file=sys.stderr, flush=True)
            assert status in ((0, -signal.SIGKILL) if aim is not None else (0,)), (place / "said.txt").read_text()
            if status:
                assert aim is not None
                phases[phase] += 1
                check_between(place, log, before)
        compare(place / "output", whole / "output")
        shutil.rmtree(place)
    # A program that was compiled anew under a name that was there before is another one, which may round otherwise.
    assert {name for name, _ in compiled(folder) - programs}.isdisjoint(name for name, _ in programs)
    return {"kills": phases.total(), "phases": dict(phases), "runs": runs}


def run_whole(folder: Path) -> Path:
    """A run that is not killed; gives its folder."""
    import_all(folder / "model")
    whole = folder / "whole"
    whole.mkdir()
    assert wait(start(whole)) == 0, (whole / "said.txt").read_text()
    return whole


def compiled(folder: Path) -> set[tuple[str, str]]:
    """The programs that runs have compiled: name of the function, and a hash of all that decides the program."""
    found = (path.name.removesuffix("-cache").rpartition("-") for path in (folder / "compiled").glob("*-cache"))
    return {(name, key) for name, _, key in found if name != "jit_stage"}  # which copies an array


# A full disk


def fill_and_free(place: Path, whole: Path, fill: Callable[[int], None], free: Callable[[], None], reason: str) -> None:
    """Let the disk be full when the second checkpoint is there, and go on when it is not full any more.

    Args:
        place: where the run works.
        whole: where one has worked that met nothing.
        fill: makes the disk full for a process.
        free: ends that.
        reason: what the system says of such a disk.

    Raises:
        AssertionError: the run was not stopped by a sentence, or what it left is not what ``whole`` has.
    """
    process = start(place)
    while 2 not in saved_steps(place / "output" / "checkpoints"):
        assert ended(process) is None, (place / "said.txt").read_text()
        time.sleep(0.001)
    fill(process)
    status = wait(process)
    said = (place / "said.txt").read_text()
    assert status == 2, said
    sentence = said[said.index("error: ") :]
    assert re.search(rf"checkpoint of step \d could not be written .*{reason}.*whole", sentence), said
    # A thread of Orbax's may tell of its own end there, now and then.
    assert "Traceback" not in sentence, said
    assert not re.search(r'File ".*(lotaqaf_jax|train\.py)', said), said
    left = saved_steps(place / "output" / "checkpoints")
    assert left, "no checkpoint is left"
    assert max(left) >= 2, left
    free()
    assert wait(start(place)) == 0, (place / "said.txt").read_text()
    assert f"resumed from step {max(left)} " in (place / "said.txt").read_text()
    compare(place / "output", whole / "output")


def limited(folder: Path, whole: Path) -> None:
    """No file of the process may grow any more: the kernel refuses to write, as it does on a full disk."""
    place = folder / "limited"
    place.mkdir()
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def fill(process: int) -> None:
        # The log is shorter, and the numbers of a checkpoint are more.
        resource.prlimit(process, resource.RLIMIT_FSIZE, (4096, unlimited[1]))

    fill_and_free(place, whole, fill, lambda: None, "File too large")


def small(folder: Path, whole: Path) -> str:
    """A file system of its own that is full, where the system lets a user make one; says whether it does."""
    place = folder / "small"
    (place / "output").mkdir(parents=True)
    status = wait(forked(lambda: _in_small(place, whole)))
    return {0: "done", 77: "refused"}.get(status, "failed")


def _in_small(place: Path, whole: Path) -> int:
    """In a process that may leave the namespaces of its users and mounts: 77 if it may not."""
    new_user, new_mounts, remount = 0x10000000, 0x00020000, 0x20
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if system.unshare(new_user | new_mounts):
        return 77
    output = place / "output"

    def mount(size: int, flags: int = 0) -> int:
        return system.mount(b"none", os.fsencode(output), b"tmpfs", flags, f"size={size}".encode())

    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return 77
    if mount(2**26):
        return 77

    def fill(_: int) -> None:
        # A process may write between the look and the mount, which is then refused.
        for _ in range(1000):
            used = shutil.disk_usage(output).used
            if mount(used + 4096, remount) == 0:
                return
        raise AssertionError("the file system cannot be made smaller")

    def free() -> None:
        assert mount(2**26, remount) == 0

    fill_and_free(place, whole, fill, free, "No space left on device")
    return 0


def main_full(folder: Path) -> dict[str, Any]:
    """Both ways to a full disk.

    Returns:
        "limited": "done"; "small": "done", "refused" where the system does not allow it, or "failed".
    """
    whole = run_whole(folder)
    limited(folder, whole)
    return {"limited": "done", "small": small(folder, whole)}


if __name__ == "__main__":
    given = Path(sys.argv[1]), *map(int, sys.argv[2:])
    print(json.dumps(main(*given) if len(given) > 1 else main_full(*given)))
