"""Summarizes a program's work by groups: FLOPs, bytes, and seconds if they can be estimated."""

import dataclasses

from train.plan.clock.read import read_clock
from train.plan.hlo.module import NotUnderstood
from train.plan.machines import Machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupWork:
    """The work of a group on one device; `seconds` is None without the compiler's estimate.

    Attributes:
      group, phase: see `train.plan.clock.groups`.
      seconds: the time by the estimate.
      memory_seconds: the time in which the device's memory moves the bytes, which includes what has
        no estimate; None for collectives.
      flops: FLOPs of products and kernels.
      bytes: bytes of operands and results; of collectives, the bytes that the device sends.
    """

    group: str
    phase: str
    seconds: float | None
    memory_seconds: float | None
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """The time estimate of a program on one device; seconds are None without an estimate.

    Attributes:
      seconds: fusions, kernels and uncovered together.
      fusions: seconds by the compiler's estimate.
      kernels: seconds of kernels, by what is assumed of them; see `read.Estimate`.
      uncovered: seconds that the device waits for links, at their assumed rate.
      links: seconds that the links are busy, waited for or not.
      memory: seconds in which the device's memory moves the bytes of all groups.
      mfu: the share of the peak that the model's own FLOPs take of the seconds; see
        `train.plan.flops.closed_form.model_flops`.
      model_flops: these FLOPs, on all devices; None for a model that reads images.
      groups: the work of each group.
      unknown: kind of instruction -> how often it ran without an estimate; these count nothing.
    """

    seconds: float | None
    fusions: float | None
    kernels: float | None
    uncovered: float | None
    links: float | None
    memory: float | None
    mfu: float | None
    model_flops: int | None
    groups: tuple[GroupWork, ...]
    unknown: dict[str, int]


def clock_of(
    text: str | None,
    machine: Machine,
    model_flops: int | None = None,
    finds_attention: bool = False,
) -> Clock | None:
    """Returns the estimate of a program for a machine; None if the HLO cannot be analyzed.

    Args:
      text: the optimised HLO; None if there is none.
      machine: the devices, and what is assumed of them.
      model_flops: FLOPs that the program needs, on all devices.
      finds_attention: see `train.plan.clock.read.read_clock`.
    """
    rates = (machine.clock, machine.flops, machine.link, machine.bandwidth)
    is_timed = None not in rates
    try:
        if text is None:
            return None
        estimate = read_clock(
            text,
            machine.clock if is_timed else None,
            peak=machine.flops or 1.0,
            kernel_share=machine.kernel_share,
            link=machine.link or 1.0,
            memory=machine.bandwidth or 1.0,
            slices=machine.n_slices,
            finds_attention=finds_attention,
        )
    except NotUnderstood:
        return None

    def estimated(seconds: float) -> float | None:
        return seconds if is_timed else None

    mfu = None
    if is_timed and model_flops is not None and machine.flops and estimate.seconds:
        mfu = model_flops / (len(machine.devices) * machine.flops * estimate.seconds)
    return Clock(
        seconds=estimated(estimate.seconds),
        fusions=estimated(estimate.fusions),
        kernels=estimated(estimate.kernels),
        uncovered=estimated(estimate.uncovered),
        links=estimated(estimate.links),
        memory=estimated(sum(estimate.memory.values())),
        mfu=mfu,
        model_flops=model_flops,
        groups=tuple(
            GroupWork(
                group=group.name,
                phase=group.phase,
                seconds=estimated(cost.seconds),
                memory_seconds=estimate.memory.get(group),
                flops=cost.flops,
                bytes=cost.bytes,
            )
            for group, cost in estimate.groups.items()
        ),
        unknown=estimate.unknown,
    )
