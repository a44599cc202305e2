"""The device mesh of a run, from the option --mesh."""

import dataclasses
import math
import re
from collections.abc import Sequence
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


def parse_mesh(text: str | None) -> dict[str, int]:
    """Parses the axis sizes of --mesh, such as ``data=2,fsdp=4``.

    Returns:
      The sizes by axis name, {} for none. -1 stands for the remaining devices.

    Raises:
      UserError: the text is not of this form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if match is None or match[1] not in AXES or match[1] in sizes:
            raise UserError(
                f"--mesh {text}: sizes such as data=2,fsdp=4 are needed, each of {', '.join(AXES)} "
                "at most once (-1 for the remaining devices)"
            )
        sizes[match[1]] = int(match[2])
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"--mesh {text}: only one axis can take the remaining devices")
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
    here = ""
    if devices is None:
        devices = all_devices()
        here = f" ({jax.process_count()} processes with {jax.local_device_count()} each)"
    slices = len(group_by_slice(devices))
    if slices == 1 and slice_axis is not None:
        raise UserError(
            f"--slice-axis {slice_axis}: the devices are of one slice, which no axis leaves: leave "
            "it out"
        )
    axis = slice_axis or SLICE_AXIS
    sizes = parse_mesh(text) or _default_sizes(batch_size, len(devices), slices, axis)
    given = math.prod(size for size in sizes.values() if size > 0)
    rest = [name for name, size in sizes.items() if size == -1]
    if rest and len(devices) % given == 0:
        sizes[rest[0]] = len(devices) // given
    elif rest or given != len(devices):
        raise UserError(f"--mesh {text} needs {given} devices, and there are {len(devices)}{here}")
    parts = math.prod(sizes.get(name, 1) for name in BATCH)
    if batch_size % parts:
        shown = " × ".join(f"{name} {sizes.get(name, 1)}" for name in BATCH)
        raise UserError(
            f"--batch-size {batch_size} cannot be sharded evenly over {parts} parts of the "
            f"mesh ({shown}): give a multiple of {parts}, or another --mesh"
        )
    with as_user_errors(TrainingError):
        return training.make_mesh(devices, slice_axis=axis, **sizes)


def _default_sizes(batch_size: int, n_devices: int, slices: int, slice_axis: str) -> dict[str, int]:
    """Returns the sizes of a mesh that is not given: those within a slice, and one over slices."""
    shared = batch_size // slices if slice_axis in BATCH else batch_size
    rows = math.gcd(max(shared, 1), n_devices // slices)
    sizes = {"fsdp": rows, "tensor": n_devices // slices // rows}
    return sizes | {slice_axis: slices * sizes.get(slice_axis, 1)}


def with_form(layout: Layout, asked: str) -> tuple[Layout, ChosenForm | None]:
    """Returns a layout with the form of products that --collective-matmul chooses.

    Args:
      layout: the placement on the mesh.
      asked: the option: auto, windowed or whole.

    Returns:
      The layout, and the choice; None where there was nothing to choose.

    Raises:
      UserError: a form was asked for where it has no effect.
    """
    with as_user_errors(TrainingError):
        form: dict[str, Form] = {"windowed": "windowed", "whole": "whole"}
        chosen = choose_form(layout.mesh.shape, layout.platform, form.get(asked))
    if chosen is None:
        return layout, None
    return dataclasses.replace(layout, collective_matmul=chosen.form), chosen
