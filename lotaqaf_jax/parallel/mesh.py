"""The mesh of devices: how many along data, fsdp and tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels.sharding import AXES

__all__ = ["make_mesh", "mesh_shape"]


def mesh_shape(
    devices: int, data: int | None = None, fsdp: int | None = None, tensor: int | None = None
) -> tuple[int, int, int]:
    """The sizes of the axes data, fsdp and tensor, whose product is the number of devices.

    What is left out is 1, and fsdp what remains: packed weights are so small that gathering them costs next to nothing,
    and what a device need not hold is room for a longer batch.

    Args:
        devices: their number.
        data: copies of the model, each with rows of its own.
        fsdp: parts that each copy is stored in, each with rows of its own too.
        tensor: devices that share the computation of a row.

    Raises:
        ConfigError: a size below 1, or sizes whose product is not ``devices``.
    """
    for flag, size in (("data_parallel", data), ("fsdp", fsdp), ("tensor_parallel", tensor)):
        if size is not None and size < 1:
            raise ConfigError(f"--{flag}: found {size}, expected at least 1.")
    given = (1 if data is None else data) * (1 if tensor is None else tensor)
    if fsdp is None:
        fsdp = max(1, devices // given)
    shape = (1 if data is None else data, fsdp, 1 if tensor is None else tensor)
    if math.prod(shape) != devices:
        raise ConfigError(
            f"--data_parallel {shape[0]} x --fsdp {shape[1]} x --tensor_parallel {shape[2]} is {math.prod(shape)}, but "
            f"there are {devices} devices. Give sizes whose product is {devices}, or leave fsdp out."
        )
    return shape


def make_mesh(
    data: int | None = None,
    fsdp: int | None = None,
    tensor: int | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over ``devices`` (None: all of all processes) with the axes data, fsdp, tensor.

    Devices of one host are neighbours on tensor first, then on fsdp, since these talk most.

    Raises:
        ConfigError: as :func:`mesh_shape`.
    """
    found = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(len(found), data, fsdp, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=found)
