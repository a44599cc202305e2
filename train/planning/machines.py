"""Machines to plan for: TPU slices, known to their compiler, or virtual devices of this CPU."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from train.run.errors import UserError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of TPU, as JAX sees one of its devices.

    Attributes:
      capacity: bytes of memory that the compiler lets a program have on a device.
      flops: a device's published peak for bf16, per second.
      devices_a_chip: 2 where JAX sees each of a chip's cores.
    """

    capacity: int
    flops: float
    devices_a_chip: int = 1


# Peaks: Google's pages on each version. Capacities: what the compiler names when it refuses.
KINDS = {
    "v5e": Kind(int(15.75 * _GIB), 197e12),
    "v5p": Kind(int(95.73 * _GIB), 459e12),
    "v6e": Kind(int(31.24 * _GIB), 918e12),
    "tpu7x": Kind(int(94.74 * _GIB), 2307e12 / 2, devices_a_chip=2),
}
_NAMED = f"one of {', '.join(f'{kind}:…' for kind in KINDS)} (such as v5e:4x4), or cpu:8"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
      name: as the topology was given.
      capacity: bytes of memory of a device.
      flops: its peak per second; None where it is not known.
    """

    name: str
    devices: Sequence[Any]
    capacity: int
    flops: float | None
    devices_a_chip: int = 1

    @property
    def n_chips(self) -> int:
        return len(self.devices) // self.devices_a_chip

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU's own compiler is asked."""
        return self.devices[0].platform == "tpu"


def find_machine(
    topology: str, capacity_gib: float | None = None, peak_tflops: float | None = None
) -> Machine:
    """The machine that a topology names.

    Args:
      topology: "v5e:4x4" and the like, or "cpu:8" for so many virtual devices.
      capacity_gib, peak_tflops: of a device, in place of what is known of it.

    Raises UserError for a topology that does not exist, or without the TPU's compiler.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology.strip())
    if found is None or found[1] not in (*KINDS, "cpu"):
        raise UserError(f"--topology {topology}: there is no such machine; give {_NAMED}")
    if found[1] == "cpu":
        machine = _of_cpu(topology, found[2])
    else:
        machine = _of_tpu(topology, KINDS[found[1]])
    if capacity_gib is not None:
        machine = dataclasses.replace(machine, capacity=int(capacity_gib * _GIB))
    if peak_tflops is not None:
        machine = dataclasses.replace(machine, flops=peak_tflops * 1e12)
    return machine


def _of_cpu(topology: str, size: str) -> Machine:
    if not size.isdigit() or not 1 <= int(size) <= 4096:
        raise UserError(f"--topology {topology}: a number of devices is needed, such as cpu:8")
    n = int(size)
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:  # JAX has its devices already
        pass
    devices = jax.devices("cpu")
    if len(devices) < n:
        raise UserError(
            f"--topology {topology}: this process began with {len(devices)} CPU devices; plan in a "
            "new one"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(topology, devices[:n], memory // n, None)


def _of_tpu(topology: str, kind: Kind) -> Machine:
    from jax.experimental import topologies

    # There is no TPU here to be asked for its surroundings, nor to be kept from other processes.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "4")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # whatever it is, it is about libtpu or about the topology
        raise UserError(f"--topology {topology}: {_why(error)}") from None
    return Machine(topology, devices, kind.capacity, kind.flops, kind.devices_a_chip)


def _why(error: Exception) -> str:
    """Why a topology could not be had, and what to do."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "lockfile" in reason:
        return (
            "another process is using the TPU's compiler, and only one at a time can: wait for it. "
            f"({reason})"
        )
    if "not installed" in reason or "libtpu" in reason:
        return (
            f"the TPU's compiler is not here ({reason}). It needs no TPU: "
            "pip install -e '.[tpu]', or pip install libtpu"
        )
    return f"the TPU's compiler knows no such slice ({reason})"
