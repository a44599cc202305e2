"""The rule that stops unpromising arms early: successive halving within each method.

Jamieson and Talwalkar, *Non-stochastic Best Arm Identification* (2016); Li et al., *Hyperband*
(2018).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from train.compare.result import Arm, Rung


class Stage(NamedTuple):
    """A stage of training, after which some arms stop.

    Attributes:
      share: share of a run's steps, at which it ends.
      kept: the share of the arms of each method that go on after it, rounded up.
    """

    share: float
    kept: float


# Of sixteen arms, four go on and then two: 16/8 + 4 · 3/8 + 2 · 1/2 = 4.5 runs' steps, not 16.
STAGES = (Stage(1 / 8, 1 / 4), Stage(1 / 2, 1 / 2))
LAST = Stage(1.0, 1.0)
MEASUREMENTS_PER_RUN = 8  # of the held-out loss, or of the score, in a run


def describe_rule(best: str) -> str:
    """Returns a description of the early-stopping rule.

    Args:
      best: what the settings that go on have: "the lowest held-out loss".
    """
    return (
        "after an eighth of the steps, and not before the learning rate's warmup is over, the "
        f"quarter of a method's settings (rounded up) with {best}, averaged over the seeds, goes "
        "on; after half of the steps, half of those, if a method has more than one left"
    )


def end_step_of_stage(stage: Stage, n_steps: int, interval: int, warmup: int = 0) -> int:
    """Returns the step that ends a stage: one at which the held-out rows are measured.

    No stage ends within the warmup: there, the setting that learns fastest has the lowest loss, and
    often it is one that diverges at its full rate.

    Args:
      stage: the stage.
      n_steps: number of steps of the whole run.
      interval: steps between measurements.
      warmup: steps in which the learning rate rises.
    """
    if stage.share >= 1:
        return n_steps
    earliest_step = max(stage.share * n_steps, warmup)
    n_intervals = math.ceil(earliest_step / interval)
    return min(n_steps, n_intervals * interval)


def stops_arms(stage: Stage, arms: Collection[Arm]) -> bool:
    """Returns True if a stage stops any of these arms. The only arm of a method never stops."""
    arm_counts = Counter(arm.method for arm in arms)
    return any(_count_kept_arms(stage, n_arms) < n_arms for n_arms in arm_counts.values())


def _count_kept_arms(stage: Stage, n_arms: int) -> int:
    """Returns the number of a method's arms that continue after a stage."""
    return max(1, math.ceil(stage.kept * n_arms))


def decide_after_stage(
    stage: Stage, values: Mapping[Arm, float], share: float, *, larger: bool = False
) -> Rung:
    """Returns the decision after a stage: the arms that continue, and those that stop.

    Args:
      stage: the stage.
      values: the mean held-out loss, or score, of each arm so far; NaN for one that failed, which
        never goes on.
      share: share of the steps, for the record.
      larger: whether a larger value is better.
    """
    sign = -1 if larger else 1
    arms_of_method: defaultdict[str, list[Arm]] = defaultdict(list)
    for arm in values:
        arms_of_method[arm.method].append(arm)
    kept_arms: list[Arm] = []
    for arms in arms_of_method.values():
        sound_arms = [arm for arm in arms if not math.isnan(values[arm])]
        sound_arms.sort(key=lambda arm: sign * values[arm])  # stable: of equals, the first named
        kept_arms += sound_arms[: _count_kept_arms(stage, len(arms))]
    # The record lists the best arms first, and failed ones last.
    ranking = sorted(values, key=lambda arm: (math.isnan(values[arm]), sign * values[arm]))
    return Rung(
        share=share,
        kept=tuple((arm, values[arm]) for arm in ranking if arm in kept_arms),
        stopped=tuple((arm, values[arm]) for arm in ranking if arm not in kept_arms),
    )
