"""The collectives of a compiled step that leave a slice.

TPU slices have a program each, whose collectives stay within the slice. What goes to other slices
is handed to the host by a `send`, and its result comes back by the `recv` of the same transfer: the
compiler makes a sum over all devices of one within each slice, and one between slices of the parts
of the sum that each device has. Hosts of GPUs share one program, in which a collective names the
groups of devices that exchange data: of one host, or of several.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from lora_jax.training.mesh import slice_of
from train.plan.hlo.collectives import device_groups, ring_bytes
from train.plan.hlo.module import Computation, Instruction, operand_arrays, size_of

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


def transferred_bytes(
    send: Instruction, transfer: SliceTransfer, computation: Computation, slices: int
) -> int:
    """Returns the bytes that a device sends to other slices.

    Args:
      send: the instruction that hands the device's array to the host.
      transfer: the transfer of the instruction.
      computation: the computation of the instruction.
      slices: number of slices that exchange data, each of which counts as one participant.

    Raises:
      ValueError: there is one slice, so that the number of participants is not known.
    """
    if slices < 2:
        raise ValueError(f"the transfer {transfer.name} leaves a slice, but there is one slice")
    received = [
        size_of(op.shapes[:1])
        for op in computation.values()
        if op.opcode == "recv" and slice_transfer(op.text) == transfer
    ]
    operand = size_of(operand_arrays(send, computation)[:1])
    array = max(received, default=operand) if transfer.kind == "all-gather" else operand
    return ring_bytes(transfer.kind, array, slices)


def crosses(text: str, slices: Sequence[int]) -> bool:
    """Returns True if a collective has a group with devices of several slices.

    Args:
      text: the operands and attributes of the collective.
      slices: the slice of each device; () for one slice.

    Raises:
      ValueError: the groups have an unknown form.
    """
    if not slices:
        return False
    groups = device_groups(text) or [range(len(slices))]
    return any(len({slices[device] for device in group}) > 1 for group in groups)
