"""The sizes of the mesh: what is left out, and what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.parallel import make_mesh, mesh_shape

sizes = st.sampled_from([None, 1, 2, 3, 4, 8])


@given(st.sampled_from([1, 2, 4, 8, 12]), sizes, sizes, sizes)
def test_a_mesh_has_every_device_and_what_was_asked_for(
    devices: int, data: int | None, fsdp: int | None, tensor: int | None
) -> None:
    try:
        shape = mesh_shape(devices, data, fsdp, tensor)
    except ConfigError:
        left = (data or 1) * (tensor or 1) * (fsdp or 1)
        assert left != devices
        assert fsdp is not None or devices % left
        return
    assert shape[0] * shape[1] * shape[2] == devices
    assert shape[0] == (data or 1)
    assert shape[2] == (tensor or 1)
    assert fsdp in (None, shape[1])


def test_fsdp_takes_the_devices_that_are_left() -> None:
    assert mesh_shape(8) == (1, 8, 1)
    assert mesh_shape(8, tensor=2) == (1, 4, 2)
    assert mesh_shape(8, 2, 2, 2) == (2, 2, 2)


@pytest.mark.parametrize(
    ("given_sizes", "says"),
    [
        ((3, None, None), "--data_parallel 3 x --fsdp 2 x --tensor_parallel 1 is 6, but there are 8 devices"),
        ((None, 16, None), "is 16, but there are 8"),
        ((None, None, 0), "--tensor_parallel: found 0, expected at least 1"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices_are_refused(given_sizes: tuple[int | None, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        mesh_shape(8, *given_sizes)


def test_devices_that_talk_most_are_neighbours() -> None:
    mesh = make_mesh(2, 2, 2)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert [device.id for device in mesh.devices.reshape(-1)] == list(range(8))
