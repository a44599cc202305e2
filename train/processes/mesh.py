"""The device mesh of a run, from the option --mesh."""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import training
from lora_jax.models.specs import AXES, BATCH
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import Layout
from lora_jax.training.mesh import SLICE_AXIS, group_by_slice
from lora_jax.training.sharded_products import ChosenForm, Form, choose_form
from train.console.errors import UserError, as_user_errors


def parse_mesh(text: str | None, names: Collection[str] | None = AXES) -> dict[str, int]:
    """Parses the axis sizes of --mesh, such as ``data=2,fsdp=4``.

    Args:
      text: the value of --mesh; None for none.
      names: the names that an axis may have; None: any name.

    Returns:
      The sizes by axis name, {} for none. -1 stands for the remaining devices.

    Raises:
      UserError: the text is not of this form.
    """
    sizes: dict[str, int] = {}
    for item in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", item)
        is_named = match is not None and (names is None or match[1] in names)
        if match is None or not is_named or match[1] in sizes:
            axes = "each axis" if names is None else f"each of {', '.join(names)}"
            raise UserError(
                f"--mesh {text} is not a mesh. Pass sizes such as data=2,fsdp=4, with {axes} at "
                "most once. -1 stands for the remaining devices."
            )
        sizes[match[1]] = int(match[2])
    if list(sizes.values()).count(-1) > 1:
        raise UserError(
            f"--mesh {text}: Only one axis can take the remaining devices. Use -1 once."
        )
    return sizes


def all_devices() -> list[jax.Device]:
    """Returns the devices of all processes."""
    return jax.devices()


def make_mesh(
    text: str | None,
    batch_size: int,
    devices: Sequence[Any] | None = None,
    slice_axis: str | None = None,
) -> Mesh:
    """Returns a mesh of all axes over the devices.

    Args:
      text: the option --mesh. By default fsdp gets as many devices of a slice as can share the
        batch, tensor gets the rest, and slice_axis goes over the slices.
      batch_size: sequences on all devices together.
      devices: by default those of all processes.
      slice_axis: the option --slice-axis; see `lora_jax.training.make_mesh`.

    Raises:
      UserError: the sizes do not multiply to the number of devices, the batch cannot be sharded
        evenly, or slices do not divide the axis, or there is one slice alone.
    """
    process_counts = ""
    if devices is None:
        devices = all_devices()
        n_local = jax.local_device_count()
        process_counts = f" ({jax.process_count()} processes with {n_local} each)"
    n_devices = len(devices)
    n_slices = len(group_by_slice(devices))
    if n_slices == 1 and slice_axis is not None:
        raise UserError(
            f"--slice-axis {slice_axis} is only useful when the devices span several slices, but "
            "all "
            f"{n_devices} devices belong to one slice. Remove --slice-axis."
        )
    axis = slice_axis or SLICE_AXIS
    sizes = parse_mesh(text) or _default_sizes(batch_size, n_devices, n_slices, axis)
    # An axis of size -1 takes the devices that the other axes leave.
    n_needed = math.prod(size for size in sizes.values() if size > 0)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if open_axes and n_devices % n_needed == 0:
        sizes[open_axes[0]] = n_devices // n_needed
    elif open_axes or n_needed != n_devices:
        raise UserError(
            f"--mesh {text} needs {n_needed} devices, but there are {n_devices}{process_counts}. "
            "Change the sizes so that their product is the number of devices."
        )
    _check_batch(batch_size, sizes)
    with as_user_errors(TrainingError):
        return training.make_mesh(devices, slice_axis=axis, **sizes)


def _check_batch(batch_size: int, sizes: dict[str, int]) -> None:
    """Raises a UserError if a batch does not divide over a mesh of these axis sizes."""
    n_parts = math.prod(sizes.get(name, 1) for name in BATCH)
    if batch_size % n_parts:
        batch_axes = " × ".join(f"{name} {sizes.get(name, 1)}" for name in BATCH)
        raise UserError(
            f"--batch-size {batch_size} cannot be sharded evenly over {n_parts} parts of the "
            f"mesh ({batch_axes}). Pass a multiple of {n_parts}, or another --mesh."
        )


def _default_sizes(
    batch_size: int, n_devices: int, n_slices: int, slice_axis: str
) -> dict[str, int]:
    """Returns the axis sizes of the default mesh: axes within a slice, and one over slices."""
    slice_devices = n_devices // n_slices
    slice_batch = batch_size // n_slices if slice_axis in BATCH else batch_size
    fsdp = math.gcd(max(slice_batch, 1), slice_devices)
    sizes = {"fsdp": fsdp, "tensor": slice_devices // fsdp}
    sizes[slice_axis] = n_slices * sizes.get(slice_axis, 1)
    return sizes


def choose_product_form(layout: Layout, option: str) -> tuple[Layout, ChosenForm | None]:
    """Returns a layout with the form of products that --collective-matmul chooses.

    Args:
      layout: the placement on the mesh.
      option: the option: auto, windowed or whole.

    Returns:
      The layout, and the choice; None where there was nothing to choose.

    Raises:
      UserError: a form was asked for where it has no effect.
    """
    forms: dict[str, Form] = {"windowed": "windowed", "whole": "whole"}
    with as_user_errors(TrainingError):
        choice = choose_form(layout.mesh.shape, layout.platform, forms.get(option))
    if choice is None:
        return layout, None
    return dataclasses.replace(layout, collective_matmul=choice.form), choice
