"""The collectives of a compiled step: their kinds, their device groups, and the bytes sent.

HLO names the groups of devices that exchange data. Pairs of sources and targets count as groups.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.plan.hlo.module import (
    Computation,
    HloModule,
    Instruction,
    bytes_of_arrays,
    operand_arrays,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The TPU compiler spreads a collective over fusions that overlap it with other work, beginning with
# an async-collective-start, which is counted. (Channels do not identify it: several may share one.)
LATER_PARTS = ("async_collective_fusion", "async-collective-done")

# Groups of devices as HLO writes them: listed, as a reshaped range, by axes of a mesh, as pairs.
_LISTED = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_RANGE = re.compile(r"\breplica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_AXES = re.compile(r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}")
_RESHAPED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
# A whole axis 'fsdp', or one of the factors of its size, 'fsdp':(outer size)size.
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


def collective_kind(op: Instruction, computation: str, caller: str) -> str | None:
    """Returns the kind of a collective; None for other instructions.

    Args:
      op: the instruction.
      computation: the name of its computation.
      caller: the name of the instruction that calls this.

    Returns:
      An entry of `COLLECTIVES`; "" for a later part of one that has begun before.
    """
    kind = op.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    if computation.startswith(LATER_PARTS) or caller.startswith(LATER_PARTS):
        return ""
    # the TPU compiler's name for the two fused
    return "reduce-scatter" if "all-reduce-scatter" in computation else kind


def sent_bytes(module: HloModule, op: Instruction, computation: Computation, kind: str) -> int:
    """Returns the bytes that one device sends in a collective.

    Where groups of devices have different sizes, the largest group counts.

    Args:
      module: the module, which says how many devices there are.
      op: the instruction.
      computation: its computation.
      kind: its kind, an entry of `COLLECTIVES`.

    Raises:
      ValueError: the groups of devices have an unknown form.
    """
    operand_bytes = bytes_of_arrays(operand_arrays(op, computation))
    participants = max(map(len, device_groups(op.text)), default=module.devices)
    array_bytes = operand_bytes * participants if kind == "all-gather" else operand_bytes
    return ring_bytes(kind, array_bytes, participants)


def ring_bytes(kind: str, array: int, participants: int) -> int:
    """Returns the bytes that one of n participants sends, by the algorithms of a ring.

    A participant sends (n - 1)/n of the array in an all-gather, a reduce-scatter and an all-to-all.
    An all-reduce is a reduce-scatter and an all-gather. In a collective-permute, a participant
    sends its array once.

    Args:
      kind: the kind of collective, an entry of `COLLECTIVES`.
      array: bytes of the gathered array of an all-gather; else bytes of a participant's operand.
      participants: n.
    """
    if kind == "collective-permute":
        return array
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * array * (participants - 1) // participants


def device_groups(text: str) -> Sequence[Sequence[int]]:
    """Returns the groups of devices that exchange data; [] if all devices form one group.

    Args:
      text: the operands and attributes of a collective.

    Raises:
      ValueError: the groups have an unknown form.
    """
    mesh_axes = _AXES.search(text)
    if mesh_axes:
        mesh, device_order, axes = mesh_axes.groups()
        return _groups_along_axes(mesh, device_order, axes)
    device_range = _RANGE.search(text)
    if device_range:
        group_shape = _parse_integers(device_range[1])
        groups: Any = _parse_device_order(device_range[2]).reshape(group_shape).tolist()
        return groups
    device_lists = _LISTED.search(text)
    if device_lists is None:
        raise ValueError(f"the HLO does not list the groups of a collective: {text[:200]}")
    return [_parse_integers(group) for group in re.findall(r"\{([\d,]*)\}", device_lists[1])]


def _groups_along_axes(mesh: str, device_order: str | None, axes: str) -> Sequence[Sequence[int]]:
    """Returns the groups of devices that differ only along some axes of a mesh.

    Args:
      mesh: its axes, such as `'data'=2,'fsdp'=4`.
      device_order: its devices, such as `[2,4]T(1,0)`; None for 0, 1, 2, …
      axes: axes along which the devices of a group differ, such as `'data','fsdp':(1)2`.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    n_devices = math.prod(sizes.values())
    indices = np.unravel_index(np.arange(n_devices), [*sizes.values()])
    coordinates = dict(zip(sizes, indices, strict=True))
    # Devices of a group have equal coordinates once those along the group's axes are zeroed.
    for name, outer_size, factor_size in _AXIS.findall(axes):
        factor = int(factor_size or sizes[name])
        inner_stride = sizes[name] // (int(outer_size or 1) * factor)
        outer_stride = inner_stride * factor
        outer_part = coordinates[name] // outer_stride * outer_stride
        coordinates[name] = outer_part + coordinates[name] % inner_stride
    devices = _parse_device_order(device_order or f"[{n_devices}]").tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, device in enumerate(devices):
        key = tuple(int(axis_coordinates[index]) for axis_coordinates in coordinates.values())
        groups.setdefault(key, []).append(device)
    return [*groups.values()]


def _parse_device_order(text: str) -> np.ndarray:
    """Returns the devices in a list, or in a reshaped and transposed range, as a flat array."""
    device_range = _RESHAPED.fullmatch(text)
    if device_range is None:
        return np.array([int(device) for device in text.split(",")])
    sizes = _parse_integers(device_range[1])
    permutation = _parse_integers(device_range[2]) if device_range[2] else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(permutation).reshape(-1)


def _parse_integers(text: str) -> list[int]:
    """Parses integers separated by commas."""
    return [int(digits) for digits in text.split(",") if digits]
