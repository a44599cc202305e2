"""Compares the time of a run's steps with the estimate of the compiler, where it estimates one."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from train.plan.clock.groups import GROUPS
from train.plan.clock.summary import clock_of
from train.plan.flops.checked import hlo_text_of
from train.plan.machines import estimating_machine
from train.run.costs import step_time

_SLOW_RATIO = 2  # a step that takes this many times the estimate is slow


class StepEstimate(NamedTuple):
    """The compiler's estimate of the time of a step.

    Attributes:
      seconds: the time of the step.
      group: the group of work that takes most of the time; see `train.plan.clock.groups`.
      group_seconds: the time of this group.
    """

    seconds: float
    group: str
    group_seconds: float


def estimate_step(step: Any, devices: Sequence[Any]) -> StepEstimate | None:
    """Returns the estimate of a compiled step, or None if there is none.

    Only the compiler of TPUs estimates a time. For other devices, the HLO is not read.

    Args:
      step: the compiled step.
      devices: the devices of the step.
    """
    machine = estimating_machine(devices)
    if machine is None:
        return None
    clock = clock_of(hlo_text_of(step), machine)
    if clock is None or not clock.seconds:
        return None
    seconds_by_group = dict.fromkeys(GROUPS, 0.0)
    for work in clock.groups:
        seconds_by_group[work.group] += work.seconds or 0.0
    largest_group = max(GROUPS, key=lambda group: seconds_by_group[group])
    return StepEstimate(
        seconds=clock.seconds, group=largest_group, group_seconds=seconds_by_group[largest_group]
    )


class SlowStepWarning:
    """Warns once if the steps of a run take more than twice their estimate."""

    def __init__(self, estimate: StepEstimate | None, notice: Callable[[str], object]) -> None:
        """Creates a warning that was not given yet.

        Args:
          estimate: the estimate; None if there is none, so that nothing is compared.
          notice: receives the warning.
        """
        self._estimate = estimate
        self._notice = notice

    def __call__(self, seconds: Sequence[float]) -> None:
        """Compares the median of the seconds of the steps so far with the estimate."""
        estimate = self._estimate
        if estimate is None or not seconds:
            return
        median = statistics.median(seconds)
        if median <= _SLOW_RATIO * estimate.seconds:
            return
        self._estimate = None  # warns once
        share = estimate.group_seconds / estimate.seconds
        self._notice(
            f"warning: a step takes {step_time(median)}, but the compiler estimates "
            f"{step_time(estimate.seconds)}. The largest part of the estimate is {estimate.group} "
            f"({share:.0%}), so look for the cause there first"
        )
