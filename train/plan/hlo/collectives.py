"""The collectives of a compiled step: kinds, devices that take part, and the bytes that each sends.

HLO names the groups of devices that exchange data. Pairs of sources and targets count as groups.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.plan.hlo.module import Computation, HloModule, Instruction, operand_arrays, size_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The TPU compiler spreads a collective over fusions that overlap it with other work, beginning with
# an async-collective-start, which is counted. (Channels do not identify it: several may share one.)
LATER_PARTS = ("async_collective_fusion", "async-collective-done")

# Groups of devices as HLO writes them: listed, as a reshaped range, by axes of a mesh, as pairs.
_LISTED = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_RANGE = re.compile(r"\breplica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_AXES = re.compile(r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}")
_RESHAPED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")  # a whole axis, or a part: (parts before) parts


def collective_kind(op: Instruction, computation: str, caller: str) -> str | None:
    """Returns the kind of a collective, None for other instructions.

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
    operands = size_of(operand_arrays(op, computation))
    devices = max(map(len, device_groups(op.text)), default=module.devices)
    array = operands * devices if kind == "all-gather" else operands
    return ring_bytes(kind, array, devices)


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
    """Returns the groups of devices that exchange data; none where all devices are one group.

    Args:
      text: the operands and attributes of a collective.

    Raises:
      ValueError: the groups have an unknown form.
    """
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
