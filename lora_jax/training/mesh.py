"""Device meshes within or across TPU slices and GPU hosts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lora_jax.models.specs import AXES
from lora_jax.training.errors import OptionWriter, TrainingError

SLICE_AXIS = "data"  # by default, what goes between slices is gradients alone
_AXIS_TYPES = (AxisType.Auto,) * len(AXES)


def make_mesh(
    devices: Sequence[Any] | None = None, *, slice_axis: str = SLICE_AXIS, **sizes: int
) -> Mesh:
    """Returns a mesh with the axes of a `Layout`, over the devices.

    The devices of a slice are joined by a fast network, and slices by a slow one. So one axis
    crosses from slice to slice, and all others stay within one: along that axis the first parts are
    on the first slice, the next parts on the second.

    Args:
      devices: by default those of all processes.
      slice_axis: axis to place across TPU slices, or across hosts of GPUs, where the devices are of
        several; see `slice_of`. Over `data` go the adapter's gradients alone, over any other axis
        the base or activations.
      **sizes: sizes of `data`, `fsdp`, `expert`, `sequence` and `tensor`; 1 for an axis that is not
        named. `lora_jax.models.specs` says what each is for.

    Raises:
      TrainingError: an unknown axis, sizes that do not multiply to the number of devices, or slices
        that do not divide `slice_axis` or differ in size.

    >>> from lora_jax import training
    >>> training.make_mesh(jax.devices()[:1], fsdp=1).shape["tensor"]
    1
    """
    devices = tuple(jax.devices() if devices is None else devices)
    if unknown := [name for name in (*sizes, slice_axis) if name not in AXES]:
        raise TrainingError(
            f"a mesh has no axis {unknown[0]!r}. Use one of its axes {', '.join(AXES)}."
        )
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(shape) != len(devices):
        raise TrainingError(
            f"the sizes {sizes} multiply to {math.prod(shape)}, but there are {len(devices)} "
            "devices. Pass sizes that multiply to that number, or devices=jax.devices()[:n]."
        )
    slices = group_by_slice(devices)
    if len(slices) == 1:
        try:
            return jax.make_mesh(shape, AXES, axis_types=_AXIS_TYPES, devices=devices)
        except NotImplementedError:  # the mesh's sizes need physical axes of the slice to be split
            split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(split, AXES, axis_types=_AXIS_TYPES)
    _check_slices(slices, slice_axis, dict(zip(AXES, shape, strict=True)))
    # Make a mesh within each slice, and join these meshes along the axis of the slices.
    slice_axis_index = AXES.index(slice_axis)
    shape_in_slice = list(shape)
    shape_in_slice[slice_axis_index] //= len(slices)
    meshes_of_slices = [
        mesh_utils.create_device_mesh(
            tuple(shape_in_slice), slices[number], allow_split_physical_axes=True
        )
        for number in sorted(slices)
    ]
    joined_mesh = np.concatenate(meshes_of_slices, axis=slice_axis_index)
    return Mesh(joined_mesh, AXES, axis_types=_AXIS_TYPES)


def slice_of(device: Any) -> int:
    """Returns the slice index of a device; a fast network connects the devices of a slice.

    A slice is a TPU slice, or for GPUs a host or the hosts that NVLink joins. All devices of other
    platforms belong to slice 0.
    """
    number = int(getattr(device, "slice_index", 0))
    if number == 0 and device.platform == "gpu":
        # XLA describes GPUs that are not here with a slice of 0, and the true one first of three
        # coordinates. Earlier versions have one coordinate, the place on the host.
        coordinates = tuple(getattr(device, "coords", ()))
        number = int(coordinates[0]) if len(coordinates) == 3 else 0
    return number


def group_by_slice(devices: Sequence[Any]) -> dict[int, list[Any]]:
    """Returns the devices of each slice, by its index, in the given order."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    return slices


def _check_slices(
    slices: Mapping[int, Sequence[Any]], slice_axis: str, shape: Mapping[str, int]
) -> None:
    """Raises a TrainingError for slices over which an axis cannot be placed."""
    n = len(slices)
    counts = [len(slices[number]) for number in sorted(slices)]
    if len({*counts}) > 1:
        raise TrainingError(
            f"the devices belong to {n} slices with {', '.join(map(str, counts))} devices, but a "
            "mesh needs as many devices of each slice. Pass such devices."
        )
    if shape[slice_axis] % n == 0:
        return
    divisible = [name for name in ("fsdp", *AXES) if shape[name] % n == 0]

    def message(option: OptionWriter) -> str:
        """Returns the error message, with options as the caller writes them."""
        parts = [
            f"the devices belong to {n} slices (TPU slices, or hosts of GPUs), and the mesh's axis "
            f"{slice_axis} crosses from slice to slice, but {slice_axis}={shape[slice_axis]} is no "
            f"multiple of {n}."
        ]
        if divisible:
            name = divisible[0]
            better = {**shape, slice_axis: shape[slice_axis] * n, name: shape[name] // n}
            text = ",".join(f"{axis}={size}" for axis, size in better.items() if size > 1)
            remedy = f"Use the mesh {text}, or {option('slice_axis', name)}"
            if name != SLICE_AXIS:
                remedy += ", which sends more data between slices"
            parts.append(f"{remedy}.")
        return " ".join(parts)

    raise TrainingError(message)
