"""The device mesh of a run, from the option --mesh."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import training
from lora_jax.models.specs import AXES, BATCH
from train.console.errors import UserError


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


def make_mesh(text: str | None, batch_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of all axes over the devices.

    Args:
      text: the option --mesh. By default fsdp gets as many devices as can share the batch, and
        tensor gets the rest.
      batch_size: sequences on all devices together.
      devices: by default those of all processes.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the batch cannot be sharded
        evenly.
    """
    here = ""
    if devices is None:
        devices = all_devices()
        here = f" ({jax.process_count()} processes with {jax.local_device_count()} each)"
    rows = math.gcd(batch_size, len(devices))
    sizes = parse_mesh(text) or {"fsdp": rows, "tensor": len(devices) // rows}
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
    return training.make_mesh(devices, **sizes)
