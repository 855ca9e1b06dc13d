"""Start one process for each GPU of this host, or several on its CPU, that run one program together.

    python -m lotaqaf_jax.launch --processes 4 train.py --model ... --dataset ...

A single process uses all GPUs of a host by itself; one process a GPU keeps each one's Python apart, and is how clusters
start programs. With several hosts, start this on each:

    python -m lotaqaf_jax.launch --processes 4 --hosts 2 --host 0 --coordinator first-host:1234 train.py ...

Every process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and the GPU of its number in
CUDA_VISIBLE_DEVICES. Ctrl-C and SIGTERM go to all. When one fails the others are ended, and its exit status is the
command's.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

__all__ = ["main"]

_GRACE = 30.0  # seconds between asking the others to stop and ending them


def main(argv: Sequence[str] | None = None) -> int:
    """Start, wait, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lotaqaf_jax.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, required=True, help="on this host")
    parser.add_argument("--hosts", type=int, default=1, help="how many hosts")
    parser.add_argument("--host", type=int, default=0, help="the number of this one, from 0")
    parser.add_argument("--coordinator", help="host:port of host 0; with one host it may be left out")
    parser.add_argument("program", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    if options.processes < 1 or not 0 <= options.host < options.hosts:
        parser.error(f"--processes {options.processes} --host {options.host} --hosts {options.hosts}: out of range")
    if options.hosts > 1 and options.coordinator is None:
        parser.error("--hosts needs --coordinator host:port, the same on every host")
    coordinator = options.coordinator or f"127.0.0.1:{_free_port()}"
    count = options.processes * options.hosts
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else None
    started: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {kind: signal.signal(kind, pass_on) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        for i in range(options.processes):
            environment = os.environ | {
                "JAX_COORDINATOR_ADDRESS": coordinator,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(options.host * options.processes + i),
                "CUDA_VISIBLE_DEVICES": str(i) if visible is None else visible[i % len(visible)],
            }
            command = [sys.executable, options.program, *options.arguments]
            # In a group of its own, so that Ctrl-C comes from here alone, once.
            started.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _wait(started)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended; once one fails the others are asked to stop, and ended if they do not."""
    status, deadline = 0, None
    while True:
        codes = [process.poll() for process in started]
        for code in codes:
            if code and not status:
                status = code if code > 0 else 128 - code
        if all(code is not None for code in codes):
            return status
        if status and deadline is None:
            deadline = time.monotonic() + _GRACE
            for process in started:
                if process.poll() is None:
                    process.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for process in started:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
