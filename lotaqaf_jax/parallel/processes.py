"""Several processes that run one program, each with devices of its own: start, meet, and read what lies on all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lotaqaf_jax.errors import ConfigError

__all__ = ["agree", "barrier", "fetch", "is_main", "start"]

_COORDINATOR, _COUNT, _NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes, if the environment tells of any; to be called before anything asks for devices.

    * JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID: what
      ``python -m lotaqaf_jax.launch`` sets, or whoever starts processes by hand.
    * SLURM with several tasks, or Open MPI's ``mpirun``: found by JAX itself.

    Nothing is done for a single process, or where JAX is distributed already.

    Raises:
        ConfigError: only some of the three variables are set, or they are no numbers.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: environment.get(name) for name in (_COORDINATOR, _COUNT, _NUMBER)}
    if any(given.values()):
        count, number = _numbers(given)
        if count > 1:
            _initialize(coordinator_address=given[_COORDINATOR], num_processes=count, process_id=number)
        return
    slurm = int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment
    if slurm or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        _initialize()


def _initialize(**arguments: Any) -> None:
    # On a CPU the collectives of a program hold threads while they wait. Two programs at once can hold all there are,
    # each waiting for a device that works on the other.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(**arguments)


def _numbers(given: Mapping[str, str | None]) -> tuple[int, int]:
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set, while others of {', '.join(given)} are. Set all three.")
    try:
        return int(str(given[_COUNT])), int(str(given[_NUMBER]))
    except ValueError:
        raise ConfigError(
            f"{_COUNT} and {_NUMBER}: found {given[_COUNT]!r} and {given[_NUMBER]!r}, not numbers."
        ) from None


def is_main() -> bool:
    """Whether this process writes files and logs: the first, or the only one."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(text: str) -> str:
    """The main process' ``text``, in every process."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    found = np.zeros(4096, np.uint8)
    encoded = text.encode()
    if len(encoded) > found.size:
        raise ValueError(f"{len(encoded)} bytes to agree on, at most {found.size} are possible")
    found[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(found)).rstrip(b"\0").decode()


def fetch(array: Any) -> np.ndarray:
    """An array in the host's memory, whichever devices of whichever processes hold it.

    Where other processes hold parts, all of them have to call it, for the same arrays in the same order.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
