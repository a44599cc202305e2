"""Machines to plan for: TPU slices, NVIDIA GPUs, or virtual devices of this CPU."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.training.mesh import group_by_slice
from train.console.errors import UserError
from train.console.extras import install_command
from train.plan.gpus import (
    CARDS,
    DEFAULT_MEMORY_SHARE,
    GPU_COMPILATIONS,
    LARGEST_MEMORY_SHARE,
    find_gpus,
)

KERNEL_SHARE = 0.5  # of the peak, that kernels are assumed to reach
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MachineKind:
    """The data of a kind of TPU device.

    Attributes:
      capacity: bytes of device memory that the compiler allows a program.
      flops: published peak FLOP/s of a device in bf16.
      clock: cycles a second, as the compiler counts them.
      link: bytes/s of a link between chips, one way.
      bandwidth: published bytes/s of a device's memory.
      devices_a_chip: JAX devices per chip; 2 if each core is a device.
    """

    capacity: int
    flops: float
    clock: float
    link: float
    bandwidth: float
    devices_a_chip: int = 1


# Peaks and bandwidths: Google's page on each version. Capacities: from the compiler's messages when
# it refuses. Clocks: the peak over the FLOPs a cycle of a device's matrix units (v5e: 4 of 128 x
# 128). Links: what "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus) states that one
# reaches, a tenth less than Google's pages have: 400 GB/s a chip of v5e, both ways, over four
# ports; v6e has 800 over four, v5p and tpu7x 1,200 over six.
KINDS = {
    "v5e": MachineKind(int(15.75 * _GIB), 197e12, 1.5e9, 45e9, 819e9),
    "v5p": MachineKind(int(95.73 * _GIB), 459e12, 1.75e9, 90e9, 2765e9),
    "v6e": MachineKind(int(31.24 * _GIB), 918e12, 1.75e9, 90e9, 1638e9),
    "tpu7x": MachineKind(int(94.74 * _GIB), 2307e12 / 2, 2.2e9, 90e9, 7380e9 / 2, 2),
}
N_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # of the grid of a slice's chips
# JAX's names of the kinds.
_VERSION_OF_TPU_KIND = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), "v5e"),
    **dict.fromkeys(("TPU v5", "TPU v5p"), "v5p"),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), "v6e"),
    **dict.fromkeys(("TPU7x", "TPU v7x"), "tpu7x"),
}
_KNOWN_TOPOLOGIES = (
    f"one of {', '.join(f'{kind}:…' for kind in KINDS)} (such as v5e:4x4, or 2xv5e:4x4 for two "
    "slices), a number of GPUs or "
    f"hosts and GPUs per host (h100:8, h100:2x8) of {', '.join(CARDS)}, or cpu:8"
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices to compile for.

    Attributes:
      name: the topology, as given.
      devices: the JAX devices, which may be descriptions.
      capacity: bytes of memory of a device.
      flops: peak FLOP/s of a device; None if it is not known.
      devices_a_chip: JAX devices per chip.
      shares: the shares of the capacity that a program may have: the first decides what fits, and
        others are shown beside it.
      bandwidth: bytes/s of a device's memory; None if it is not known.
      compilations: options of the compiler; a plan compiles with each, and takes the most memory.
      remarks: what a plan has to say of the machine, in sentences.
      clock: cycles a second of a compiler that estimates cycles; None where it does not.
      link: bytes/s that collectives move along an axis of the mesh; None if it is not known.
      kernel_share: the share of the peak that kernels are assumed to reach.
    """

    name: str
    devices: Sequence[Any]
    capacity: int
    flops: float | None
    devices_a_chip: int = 1
    shares: tuple[float, ...] = (1.0,)
    bandwidth: float | None = None
    compilations: tuple[dict[str, Any], ...] = ({},)
    remarks: tuple[str, ...] = ()
    clock: float | None = None
    link: float | None = None
    kernel_share: float = KERNEL_SHARE

    @property
    def n_chips(self) -> int:
        """The number of chips."""
        return len(self.devices) // self.devices_a_chip

    @property
    def n_slices(self) -> int:
        """The number of TPU slices, or of hosts of GPUs."""
        return len(group_by_slice(self.devices))

    @property
    def platform(self) -> str:
        """The platform of the devices, which determines the compiler: "cpu", "gpu" or "tpu"."""
        platform: str = self.devices[0].platform
        return platform


def find_machine(
    topology: str,
    capacity_gib: float | None = None,
    peak_tflops: float | None = None,
    mem_fraction: float | None = None,
) -> Machine:
    """Returns the machine of a topology's name.

    Args:
      topology: a TPU slice such as "v5e:4x4", several such as "2xv5e:4x4", GPUs such as "h100:8",
        or "cpu:8" for eight virtual devices.
      capacity_gib: memory of a device in GiB, to override the known one.
      peak_tflops: peak TFLOP/s of a device, to override the known one.
      mem_fraction: share of a GPU's memory that JAX reserves, to override its default.

    Raises:
      UserError: the topology does not exist, its compiler is not installed, or a share is given for
        what is no GPU.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z][\w-]*):(\d+(?:x\d+)*)", topology.strip())
    if match is None or match[2] not in (*KINDS, *CARDS, "cpu"):
        raise UserError(f"--topology {topology} names no known machine. Pass {_KNOWN_TOPOLOGIES}.")
    slices, kind, size = match.groups()
    if kind in KINDS and size == "1":
        size = "x".join(["1"] * N_DIMENSIONS[kind])  # v5e:1 is v5e:1x1, one chip
        topology = f"{slices}x{kind}:{size}" if slices else f"{kind}:{size}"
    if mem_fraction is not None and kind not in CARDS:
        raise UserError(
            f"--mem-fraction {mem_fraction} only applies to GPUs, but --topology is {topology}. "
            "Remove --mem-fraction."
        )
    if slices and kind not in KINDS:
        remedy = f"Pass {kind}:{size}."
        if kind in CARDS:
            remedy = f"For {slices} hosts of GPUs, pass {kind}:{slices}x{size}."
        raise UserError(f"--topology {topology} is wrong, because only TPUs have slices. {remedy}")
    if kind == "cpu":
        machine = _cpu_machine(topology, size)
    elif kind in CARDS:
        machine = _gpu_machine(topology, kind, size, mem_fraction)
    else:
        machine = _tpu_machine(topology, f"{kind}:{size}", int(slices or 1), KINDS[kind])
    if capacity_gib is not None:
        machine = dataclasses.replace(machine, capacity=int(capacity_gib * _GIB))
    if peak_tflops is not None:
        machine = dataclasses.replace(machine, flops=peak_tflops * 1e12)
    return machine


def topology_of_devices(devices: Sequence[Any]) -> str | None:
    """Returns the topology's name for some devices, as `find_machine` takes it, or None.

    Args:
      devices: the devices of one process, of one kind.
    """
    platform = devices[0].platform
    device_kind = devices[0].device_kind
    if platform == "cpu":
        return f"cpu:{len(devices)}"
    if platform == "tpu":
        kind = _VERSION_OF_TPU_KIND.get(device_kind)
        if kind is None:
            return None
        n_dimensions = N_DIMENSIONS[kind]
        coordinates = np.array([device.coords for device in devices])
        grid = 1 + coordinates.max(axis=0) - coordinates.min(axis=0)
        return f"{kind}:{'x'.join(str(size) for size in grid[:n_dimensions])}"
    for card_name, card in CARDS.items():
        if card.name == device_kind:
            return f"{card_name}:{len(devices)}"
    return None


def estimating_machine(devices: Sequence[Any]) -> Machine | None:
    """Returns the machine of devices, or None if their compiler estimates no time.

    Args:
      devices: the devices of a program.
    """
    version = _VERSION_OF_TPU_KIND.get(devices[0].device_kind)
    return None if version is None else _machine_of_kind(version, devices, KINDS[version])


def with_assumptions(
    machine: Machine, kernel_share: float | None, link_gbytes: float | None
) -> Machine:
    """Returns a machine with the assumed rates of the options; see `Machine`.

    Raises:
      UserError: its compiler estimates no time, so that neither has an effect.
    """
    values = {"--kernel-share": kernel_share, "--link-gbytes": link_gbytes}
    options = [f"{option} {value:g}" for option, value in values.items() if value is not None]
    if options and machine.clock is None:
        raise UserError(
            f"{' and '.join(options)} only affects plans for TPUs, whose compiler estimates the "
            f"time of a step, but --topology is {machine.name}. Remove it."
        )
    return dataclasses.replace(
        machine,
        kernel_share=machine.kernel_share if kernel_share is None else kernel_share,
        link=machine.link if link_gbytes is None else link_gbytes * 1e9,
    )


def _cpu_machine(topology: str, size: str) -> Machine:
    """Returns virtual devices of this CPU, which share its memory."""
    if not size.isdigit() or not 1 <= int(size) <= 4096:
        raise UserError(
            f"--topology {topology} needs a number of devices from 1 to 4096. Pass cpu:8, for "
            "example."
        )
    n_devices = int(size)
    try:
        jax.config.update("jax_num_cpu_devices", n_devices)
    except RuntimeError:  # JAX has its devices already
        pass
    devices = jax.devices("cpu")
    if len(devices) < n_devices:
        raise UserError(
            f"--topology {topology} needs more CPU devices than the {len(devices)} that this "
            "process "
            "started with. Start the plan in a new process."
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        name=topology, devices=devices[:n_devices], capacity=memory // n_devices, flops=None
    )


def _gpu_machine(topology: str, kind: str, size: str, mem_fraction: float | None) -> Machine:
    """Returns NVIDIA GPUs of one kind, with the share of memory that programs may use."""
    card = CARDS[kind]
    reserved_share = mem_fraction or DEFAULT_MEMORY_SHARE
    has_one_share = reserved_share == LARGEST_MEMORY_SHARE
    return Machine(
        name=topology,
        devices=find_gpus(topology, kind, size),
        capacity=card.memory,
        flops=card.flops,
        shares=(reserved_share,) if has_one_share else (reserved_share, LARGEST_MEMORY_SHARE),
        bandwidth=card.bandwidth,
        compilations=GPU_COMPILATIONS,
        remarks=card.remarks,
    )


def _tpu_machine(topology: str, name: str, n_slices: int, kind: MachineKind) -> Machine:
    """Returns the devices of TPU slices as their compiler describes them."""
    from jax.experimental import topologies

    # There is no TPU here: libtpu must neither query its metadata nor lock it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "4")
    slice_options = {"num_slices": n_slices} if n_slices > 1 else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **slice_options
        )
    except Exception as error:  # any error here is about libtpu or about the topology
        raise UserError(
            f"--topology {topology} cannot be planned. {_topology_problem(error)}"
        ) from None
    return _machine_of_kind(topology, description.devices, kind)


def _machine_of_kind(name: str, devices: Sequence[Any], kind: MachineKind) -> Machine:
    """Returns TPU devices of a kind, with the rates of the kind."""
    return Machine(
        name=name,
        devices=devices,
        capacity=kind.capacity,
        flops=kind.flops,
        devices_a_chip=kind.devices_a_chip,
        clock=kind.clock,
        bandwidth=kind.bandwidth,
        link=2 * kind.link,  # to both neighbours at once
    )


def _topology_problem(error: Exception) -> str:
    """Returns the reason why a topology has no description, and the remedy."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if "lockfile" in reason:
        return (
            "Another process is using the TPU's compiler, which only one process can use at a "
            f"time ({reason}). Wait until that process ends."
        )
    if "not installed" in reason or "libtpu" in reason:
        return (
            f"The TPU's compiler is not installed ({reason}). It needs no TPU. Install it with "
            f"{install_command('tpu')}, or pip install libtpu."
        )
    return f"The TPU's compiler does not know this slice ({reason}). Check its size."
