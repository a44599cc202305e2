"""Meshes over several TPU slices, or hosts of GPUs: one axis goes between them, no other does."""

import dataclasses

import jax
import numpy as np
import pytest

from lora_jax import training
from lora_jax.models.specs import AXES
from lora_jax.training.mesh import slice_of


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device as meshes see it."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "cpu"  # which has no shape of its own
    process_index: int = 0
    coords: tuple[int, ...] = (0, 0, 0)


def interleaved(n_slices, n_devices, **facts):
    """Devices in an order that tells nothing of their slices."""
    return [FakeDevice(i, i % n_slices, platform="cpu", **facts) for i in range(n_devices)]


@pytest.mark.parametrize(
    ("n_slices", "sizes", "axis"),
    [
        (2, {"data": 2, "fsdp": 4}, "data"),
        (2, {"data": 4, "fsdp": 2}, "data"),
        (4, {"data": 4, "tensor": 3}, "data"),
        (2, {"fsdp": 8}, "fsdp"),
        (2, {"fsdp": 4, "tensor": 2}, "tensor"),
        (3, {"fsdp": 2, "expert": 6, "sequence": 2}, "expert"),
    ],
)
def test_one_axis_goes_between_slices(n_slices, sizes, axis):
    devices = interleaved(n_slices, np.prod([*sizes.values()]))
    mesh = training.make_mesh(devices, slice_axis=axis, **sizes)
    assert mesh.axis_names == AXES and {*mesh.devices.flat} == {*devices}
    assert {name: n for name, n in mesh.shape.items() if n > 1} == sizes
    slices = np.vectorize(slice_of)(mesh.devices)
    along = np.moveaxis(slices, AXES.index(axis), 0).reshape(sizes[axis], -1)
    expected = np.arange(sizes[axis]) // (sizes[axis] // n_slices)
    np.testing.assert_array_equal(along, np.broadcast_to(expected[:, None], along.shape))


def test_devices_of_one_slice_stand_as_ever():
    """They have no slice_index, or all the same."""
    sizes = {"data": 2, "tensor": 2}
    mesh = training.make_mesh(jax.devices()[:4], slice_axis="fsdp", **sizes)
    assert mesh == jax.make_mesh(
        (2, 1, 1, 1, 2), AXES, axis_types=mesh.axis_types, devices=jax.devices()[:4]
    )
    assert [slice_of(device) for device in jax.devices()] == [0] * 4


@pytest.mark.parametrize(
    ("sizes", "axis", "says"),
    [
        ({"fsdp": 8}, "data", r"data=1 is no multiple of 2. Use the mesh data=2,fsdp=4, or "),
        ({"fsdp": 8}, "data", r"or slice_axis='fsdp', which sends more data between slices.$"),
        ({"data": 8}, "fsdp", r"fsdp=1 .* Use the mesh data=4,fsdp=2, or slice_axis='data'.$"),
        ({"data": 8}, "model", "a mesh has no axis 'model'"),
    ],
)
def test_an_axis_that_slices_do_not_divide(sizes, axis, says):
    with pytest.raises(training.TrainingError, match=says):
        training.make_mesh(interleaved(2, 8), slice_axis=axis, **sizes)


def test_slices_of_different_sizes():
    with pytest.raises(training.TrainingError, match="to 2 slices with 4, 3 devices, but a mesh"):
        training.make_mesh(interleaved(2, 7), data=7)


def test_the_slices_of_gpus():
    """A host that is there has a slice_index; of one that is not, three coordinates tell."""
    there = FakeDevice(9, 3, "gpu", coords=(3, 0, 1))
    described = FakeDevice(9, 0, "gpu", coords=(3, 0, 1))
    on_host = FakeDevice(9, 0, "gpu", coords=(3,))  # a place on its host
    of_tpu = FakeDevice(9, 0, "tpu", coords=(3, 0, 1))  # a place in its slice
    devices = (there, described, on_host, of_tpu)
    assert [slice_of(device) for device in devices] == [3, 3, 0, 0]


def test_each_slice_has_rows_of_its_own():
    """Its hosts make arrays of no others, in whichever order JAX lists the devices."""
    devices = interleaved(2, 8)
    first = {device for device in devices if slice_of(device) == 0}

    def rows_of_first(mesh):
        where = training.Layout(mesh, ()).of_batch((24, 5), parts=False)
        of = {device: rows for device, (rows, _) in where.devices_indices_map((24, 5)).items()}
        return sorted({row for device in first for row in range(*of[device].indices(24))})

    mesh = training.make_mesh(devices, data=2, fsdp=4)
    assert rows_of_first(mesh) == [*range(12)]
    listed = jax.sharding.Mesh(np.reshape(devices, mesh.devices.shape), AXES)
    assert rows_of_first(listed) != [*range(12)], "the control"
