"""The transfers of a compiled step between TPU slices or hosts of GPUs.

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
from train.plan.hlo.module import Computation, Instruction, bytes_of_arrays, operand_arrays

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
    """Returns the slice of each device, in the HLO's device order; () for a single slice."""
    slices = [slice_of(device) for device in mesh.devices.flat]
    if mesh.devices.flat[0].platform == "tpu":  # the HLO numbers devices slice by slice
        slices.sort()
    has_several = len(set(slices)) > 1
    return tuple(slices) if has_several else ()


def slice_transfer(text: str) -> SliceTransfer | None:
    """Returns the transfer of a send or a recv; None for a transfer to the device's own host."""
    kind_match = _KIND.search(text)
    name_match = _TRANSFER.search(text)
    if kind_match is None or name_match is None:
        return None
    kind = kind_match[1]
    return SliceTransfer(name_match[1], _KINDS.get(kind, kind.lower().replace("_", "-")))


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
    array_bytes = bytes_of_arrays(operand_arrays(send, computation)[:1])
    if transfer.kind == "all-gather":  # the gathered array is the one that is received
        received_bytes = [
            bytes_of_arrays(op.shapes[:1])
            for op in computation.values()
            if op.opcode == "recv" and slice_transfer(op.text) == transfer
        ]
        array_bytes = max(received_bytes, default=array_bytes)
    return ring_bytes(transfer.kind, array_bytes, slices)


def crosses_slices(text: str, slices: Sequence[int]) -> bool:
    """Returns True if a collective has a group with devices of several slices.

    Args:
      text: the operands and attributes of the collective.
      slices: the slice of each device; () for one slice.

    Raises:
      ValueError: the groups have an unknown form.
    """
    if not slices:
        return False
    for group in device_groups(text) or [range(len(slices))]:
        group_slices = {slices[device] for device in group}
        if len(group_slices) > 1:
            return True
    return False
