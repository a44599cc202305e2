"""Reads the compiler's estimate of a step from its optimised HLO."""

import dataclasses

from train.plan.clock.groups import COLLECTIVES, GROUPS, PHASES, Group
from train.plan.clock.walk import Cost, DeviceRates, Walk
from train.plan.hlo.module import PARSE_ERRORS, HloModule, NotUnderstood
from train.plan.hlo.origins import KernelOrigins
from train.plan.machines import KERNEL_SHARE, KINDS

_V5E = KINDS["v5e"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of one call of a program on one device.

    Attributes:
      seconds: the time of all; 0 without rates, as everything below in seconds.
      fusions: seconds of what the compiler estimates.
      kernels: seconds of kernels, by an assumed share of the peak; of few rows by codes, by the
        memory's rate or the cycles of their schedule, whichever takes longer.
      uncovered: seconds that the device waits for links, by their assumed rate.
      links: seconds that the links are busy, waited for or not.
      groups: the cost of each group, in the order of `GROUPS` and `PHASES`.
      memory: the seconds that the device's main memory takes to move the bytes of each group.
        Collectives are not listed, because their bytes go over links.
      unknown: kind of instruction -> how often it ran without an estimate; these count nothing.
    """

    seconds: float
    fusions: float
    kernels: float
    uncovered: float
    links: float
    groups: dict[Group, Cost]
    memory: dict[Group, float]
    unknown: dict[str, int]

    def cost(self, name: str, phase: str | None = None) -> Cost:
        """Returns the cost of a group, in one phase or in all of them."""
        total = Cost()
        for group, cost in self.groups.items():
            if group.name == name and phase in (None, group.phase):
                total = total.plus(cost)
        return total

    @property
    def flops(self) -> int:
        """The FLOPs of products and kernels."""
        return sum(cost.flops for cost in self.groups.values())

    def lines(self) -> list[str]:
        """Returns the groups as lines of text: milliseconds, TFLOP and GB."""
        seconds_by_source = {
            "fusions, as the compiler estimates": self.fusions,
            "kernels, assumed": self.kernels,
            "links uncovered, assumed": self.uncovered,
        }
        lines = [
            f"{source:36}{1e3 * seconds:10.2f} ms" for source, seconds in seconds_by_source.items()
        ]
        for group, cost in self.groups.items():
            title = f"{group.name} {group.phase}".strip()
            lines.append(
                f"{title:36}{1e3 * cost.seconds:10.2f} ms"
                f"{1e3 * self.memory.get(group, 0.0):10.2f} ms by memory"
                f"{cost.flops / 1e12:12.4f} TFLOP{cost.bytes / 1e9:10.3f} GB"
            )
        return lines


def read_clock(
    text: str,
    clock: float | None = _V5E.clock,
    *,
    peak: float = _V5E.flops,
    kernel_share: float = KERNEL_SHARE,
    link: float = 2 * _V5E.link,
    memory: float = _V5E.bandwidth,
    slices: int = 1,
    finds_attention: bool = False,
) -> Estimate:
    """Returns the compiler's estimate of a program; the defaults are those of a TPU v5e.

    Seconds of fusions are estimates of the compiler, never measured. Asynchronous copies between
    memories count nothing. Collectives share the links, one after the other.

    Args:
      text: the optimised HLO, as returned by ``compiled.as_text()``.
      clock: cycles a second; None where the compiler estimates none, as GPUs' does.
      peak: FLOP/s of a device.
      kernel_share: the share of the peak that kernels reach, whose cycles the compiler does not
        state.
      link: bytes that a device sends a second over its links along an axis of the mesh.
      memory: bytes a second of a device's memory.
      slices: number of TPU slices that exchange data.
      finds_attention: whether products of two activations are attention, in scopes that name no
        group.

    Raises:
      NotUnderstood: the HLO has an unknown form, or does not say how often a loop runs.
    """
    rates: DeviceRates | None = None
    if clock is not None:
        rates = DeviceRates(
            clock=clock, peak=peak, kernel=kernel_share * peak, link=link, memory=memory
        )
    try:
        module = HloModule(text)
        origins = KernelOrigins(module) if finds_attention else None
        tally = Walk(module, rates, slices, origins=origins).tally(module.entry)
    except NotUnderstood:
        raise
    except PARSE_ERRORS as error:
        raise NotUnderstood(f"the HLO is not written as expected: {error!r}") from error
    groups = [Group(name, phase) for name in GROUPS for phase in PHASES]
    costs = {group: tally.costs[group] for group in groups if group in tally.costs}
    link_waits = [cost.seconds for group, cost in costs.items() if group.name == COLLECTIVES]
    wait_seconds = sum(link_waits)
    memory_seconds: dict[Group, float] = {}
    if rates is not None:
        for group, cost in costs.items():
            if group.name != COLLECTIVES:
                memory_seconds[group] = cost.memory / rates.memory
    return Estimate(
        seconds=tally.seconds,
        fusions=tally.seconds - tally.kernels - wait_seconds,
        kernels=tally.kernels,
        uncovered=wait_seconds,
        links=tally.links,
        groups=costs,
        memory=memory_seconds,
        unknown=dict(tally.unknown),
    )
