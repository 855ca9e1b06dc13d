"""Two real processes of two devices each, over the loopback interface: train, stop, resume, merge, export, verify."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.launch import main as launch
from lotaqaf_jax.parallel.processes import agree, fetch, start
from lotaqaf_jax.training.checkpoints import saved_steps
from tests.training.conftest import write_rows, write_tiny_gptq

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of train.py: a tiny model and rows of 16 an update, in any layout of four devices whose rows are cut in two."""
    folder = tmp_path_factory.mktemp("run")
    model, rows = write_tiny_gptq(folder / "model"), str(write_rows(folder / "rows.jsonl", 40))
    return [
        *("--model", str(model), "--dataset", rows, "--max_steps", str(STEPS), "--lora_r", "8"),
        *("--target_modules", "q_proj", "down_proj", "--per_device_train_batch_size", "4", "--save_steps", "2"),
        *("--eval_dataset", rows, "--max_eval_samples", "10", "--offset", "reference"),
    ]


def command(processes: int, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line of train.py on four devices in all, and its environment."""
    devices = f"--xla_force_host_platform_device_count={4 // processes} --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {
        "XLA_FLAGS": devices,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # on a CPU, programs of several processes hang when they come from it
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time is compilation
        "PYTHONPATH": str(ROOT),
    }
    program = [str(ROOT / "train.py"), *arguments]
    if processes > 1:
        program = ["-m", "lotaqaf_jax.launch", "--processes", str(processes), *program]
    return [sys.executable, *program], environment


def run(processes: int, *arguments: str) -> str:
    line, environment = command(processes, *arguments)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def written(folder: Path) -> dict[str, Any]:
    """Every file of adapter and merged model, and the log without its times."""
    name = str(folder).encode()
    found = [file for file in folder.glob("[am]*/**/*") if file.is_file()]
    files = {str(file.relative_to(folder)): file.read_bytes().replace(name, b"here") for file in found}
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
    return files | {"log": log}


MESH = ("--fsdp", "2", "--tensor_parallel", "2")


@pytest.fixture(scope="module")
def two(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "out"
    return folder, run(2, *flags, *MESH, "--output_dir", str(folder))


def test_two_processes_do_what_one_does(flags: list[str], two: tuple[Path, str], tmp_path: Path) -> None:
    folder, said = two
    alone = run(1, *flags, *MESH, "--output_dir", str(tmp_path / "out"))
    one, other = written(tmp_path / "out"), written(folder)
    assert one.keys() == other.keys()
    # Sums between processes have another order than those within one.
    for line, there in zip(one["log"], other["log"], strict=True):
        assert there == pytest.approx(line, rel=1e-3)
    tensors, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path / "out", folder))
    for name, array in tensors.items():
        assert np.mean(array == theirs[name]) > 0.999, name
    assert said.count("bit-identical to the adapter model") == 1, "one process prints"
    assert next(x for x in said.splitlines() if x.startswith("held-out loss")) in alone
    assert not list(folder.parent.glob("**/*partial*")), "nothing is left half written"
    assert any(np.any(array) for name, array in tensors.items() if name.endswith("lota_B"))


def wait_for(running: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Until it is so, or the run has ended by itself."""
    give_up = time.monotonic() + 200
    while not reached() and running.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_killed_then_stopped_by_a_signal_a_run_goes_on_to_the_same_bits(
    flags: list[str], two: tuple[Path, str], tmp_path: Path
) -> None:
    """One command line, three times: one of its processes is killed, then all are asked to stop, then it may end."""
    folder = tmp_path / "out"
    arguments = [*flags, *MESH, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    line, environment = command(2, *arguments)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen(line, env=environment, **pipes)
    try:
        # With the second checkpoint the first is whole.
        wait_for(running, lambda: 4 in saved_steps(folder / "checkpoints"))
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        running.communicate(timeout=100)
    finally:
        running.kill()
    assert running.returncode == 128 + signal.SIGKILL
    assert not (folder / "merged").exists()

    latest = max(saved_steps(folder / "checkpoints"))
    running = subprocess.Popen(line, env=environment, **pipes)
    try:
        wait_for(running, lambda: max(saved_steps(folder / "checkpoints")) > latest)
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=200)
    finally:
        running.kill()
    assert running.returncode == 128 + signal.SIGTERM, said[-3000:]
    assert "resumed from step" in said, "the same command line"
    stopped = re.findall(r"stopped after step (\d+)", said)
    assert len(stopped) == 2
    assert len(set(stopped)) == 1, "all processes after the same step"
    assert int(stopped[0]) < STEPS

    assert f"resumed from step {stopped[0]}" in run(2, *arguments)
    assert written(folder) == written(two[0])


def test_on_other_devices_it_resumes_and_says_what_may_differ(
    flags: list[str], two: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(two[0], folder)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    assert len(steps) == 2, "no more than save_total_limit are kept"
    shutil.rmtree(folder / "checkpoints" / str(steps[-1]))
    mesh = ("--data_parallel", "2", "--tensor_parallel", "1", "--per_device_train_batch_size", "2")
    said = run(1, *flags, *mesh, "--output_dir", str(folder), "--resume_from_checkpoint", "latest")
    assert f"resumed from step {steps[0]} of {STEPS}; mesh [1, 2, 2] then, [2, 2, 1] now" in said
    assert "losses agree to rounding" in said
    before, after = ([line for line in written(path)["log"] if "loss" in line] for path in (two[0], folder))
    assert [line["step"] for line in after] == list(range(1, STEPS + 1))
    for one, other in zip(before, after, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)


def test_a_failed_process_ends_the_others(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1':\n    sys.exit(7)\ntime.sleep(100)\n"
    )
    began = time.monotonic()
    assert launch(["--processes", "3", str(program)]) == 7
    assert time.monotonic() - began < 60


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID: not set"):
        start({"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "2"})
    with pytest.raises(ConfigError, match="found 'two' and '0', not numbers"):
        start({"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"})


def test_alone_there_is_nothing_to_agree_on() -> None:
    start({})
    assert agree("text") == "text"
    np.testing.assert_array_equal(fetch(np.arange(3)), [0, 1, 2])
