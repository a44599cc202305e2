"""The collectives of a compiled step that leave a slice.

TPU slices have a program each, whose collectives stay within the slice. What goes to other slices
is handed to the host by a `send`, and its result comes back by the `recv` of the same transfer: the
compiler makes a sum over all devices of one within each slice, and one between slices of the parts
of the sum that each device has. Hosts of GPUs share one program, in which a collective names the
groups of devices that exchange data: of one host, or of several.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from lora_jax.training.mesh import slice_of
from train.plan.hlo.module import Computation, Instruction, operand_arrays, size_of

# Groups of devices as HLO writes them: listed, as a reshaped range, by axes of a mesh, as pairs.
_LISTED = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_RANGE = re.compile(r"\breplica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_AXES = re.compile(r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}")
_RESHAPED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")  # a whole axis, or a part: (parts before) parts

_TRANSFER = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_KIND = re.compile(r'_xla_megascale_transfer_type="([^"]*)"')
_KINDS = {"ONE_TO_ONE": "collective-permute"}


class SliceTransfer(NamedTuple):
    """A transfer between TPU slices.

    Attributes:
      name: its name, which a send and a recv share.
      kind: the collective that the slices' hosts carry out, as HLO names it: "all-reduce".
    """

    name: str
    kind: str


def slices_in_hlo(mesh: Mesh) -> tuple[int, ...]:
    """Returns the slice of each device, by its number in the HLO; () for devices of one slice."""
    numbers = [slice_of(device) for device in mesh.devices.flat]
    if mesh.devices.flat[0].platform == "tpu":  # numbered within a slice
        numbers.sort()
    return tuple(numbers) if len({*numbers}) > 1 else ()


def slice_transfer(text: str) -> SliceTransfer | None:
    """Returns the transfer of a send or a recv; None for one that stays on a device's host."""
    kind, name = _KIND.search(text), _TRANSFER.search(text)
    if kind is None or name is None:
        return None
    return SliceTransfer(name[1], _KINDS.get(kind[1], kind[1].lower().replace("_", "-")))


def transferred_bytes(send: Instruction, transfer: SliceTransfer, computation: Computation) -> int:
    """Returns the bytes that a device gives to other slices, or gets, whichever are more."""
    got = [
        size_of(op.shapes[:1])
        for op in computation.values()
        if op.opcode == "recv" and slice_transfer(op.text) == transfer
    ]
    return max([size_of(operand_arrays(send, computation)[:1]), *got])


def crosses(text: str, slices: Sequence[int]) -> bool:
    """Returns True if a collective has a group with devices of several slices.

    Args:
      text: the operands and attributes of the collective.
      slices: the slice of each device; () for one slice.

    Raises:
      ValueError: its groups are of an unknown form.
    """
    if not slices:
        return False
    groups = _groups(text) or [range(len(slices))]  # none: all devices
    return any(len({slices[device] for device in group}) > 1 for group in groups)


def _groups(text: str) -> Sequence[Sequence[int]]:
    if by_axes := _AXES.search(text):
        return _along_axes(*by_axes.groups())
    if given := _RANGE.search(text):
        groups: Any = _ordered(given[2]).reshape(_numbers(given[1])).tolist()
        return groups
    if (listed := _LISTED.search(text)) is None:
        raise ValueError(f"a collective whose groups are not listed: {text[:200]}")
    return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]


def _along_axes(mesh: str, order: str | None, axes: str) -> Sequence[Sequence[int]]:
    """Returns the groups along axes of a mesh.

    Args:
      mesh: its axes, such as `'data'=2,'fsdp'=4`.
      order: its devices, such as `[2,4]T(1,0)`; None for 0, 1, 2, …
      axes: axes along which devices are together, such as `'data','fsdp':(1)2`.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    places = np.unravel_index(np.arange(math.prod(sizes.values())), [*sizes.values()])
    at = dict(zip(sizes, places, strict=True))
    for name, before, part in _AXIS.findall(axes):  # devices that differ along these are together
        inner = sizes[name] // (int(before or 1) * int(part or sizes[name]))
        outer = inner * int(part or sizes[name])
        at[name] = at[name] // outer * outer + at[name] % inner
    groups: dict[tuple[int, ...], list[int]] = {}
    keys = zip(*(place.tolist() for place in at.values()), strict=True)
    for device, key in zip(_ordered(order or f"[{len(places[0])}]").tolist(), keys, strict=True):
        groups.setdefault(key, []).append(device)
    return [*groups.values()]


def _ordered(text: str) -> np.ndarray:
    """Returns devices from their list, or from a range that is reshaped and transposed, flat."""
    if (given := _RESHAPED.fullmatch(text)) is None:
        return np.array([int(n) for n in text.split(",")])
    sizes = _numbers(given[1])
    order = _numbers(given[2]) if given[2] else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
