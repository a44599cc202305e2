"""The divergence of rewards and of examples from the base, at the same score and equal rates."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from train.compare.reporting import tables, words
from train.compare.reporting.gap import gap_of, with_error
from train.compare.reporting.tables import ArmRow, Criterion
from train.compare.result import Comparison, Point, RunResult
from train.findings.reporting.pivot import shown

NAME = "divergence at one score"  # of the measure
SHARE = 0.9  # of the way from the base's score to the best that every method reaches
_PAIRS = (("lora", "sft"), ("full", "sft-full"))  # by rewards, and by examples


class CommonScore(NamedTuple):
    """A comparison at the score that all methods reach.

    Attributes:
      level: the score: `SHARE` of the way from the base's to the lowest of the methods' best.
      comparison: the runs, each with its divergence where it first reaches the score, if it does.
      measure: the divergence there.
    """

    level: float
    comparison: Comparison
    measure: Criterion

    @property
    def rows(self) -> tuple[ArmRow, ...]:
        """Returns a row for each arm, in the order of their first runs."""
        return tables.arm_rows(self.comparison, self.measure)


def common_score(comparison: Comparison) -> CommonScore | None:
    """Returns a comparison at the score that all methods reach.

    None where the divergence was not measured, the base's score is not known, or some method
    learned nothing.
    """
    best = tables.best_of_each(tables.rows(comparison), lambda arm: arm.method)
    base = next(iter(comparison.facts.baselines.values()), None)
    if base is None or not any(run.divergences for run in comparison.runs):
        return None
    lowest = min(row.quality.mean for row in best if row.quality)
    if lowest <= base:
        return None
    level = base + SHARE * (lowest - base)
    runs = []
    for run in comparison.runs:
        value = _divergence_at(run, base, level)
        points = () if value is None else (Point(run.steps, value),)
        runs.append(dataclasses.replace(run, divergences=points))
    plain = tables.criteria(comparison.facts)["divergence"]
    name = f"{plain.name} where the {comparison.facts.score} first reaches {level:.3f}"
    at_level = dataclasses.replace(comparison, runs=tuple(runs))
    return CommonScore(level, at_level, plain._replace(name=name))


def sentences(comparison: Comparison) -> list[str]:
    """Returns a sentence for each pair of rewards and examples at one rate; [] for none."""
    common = common_score(comparison)
    if common is None:
        return []
    arms = [row.arm for row in common.rows]
    return [
        f"At the rate {shown(by_rewards.arm.learning_rate)} for both, where the "
        f"{comparison.facts.score} reaches {common.level:.3f}: "
        f"{words.adapter(by_rewards.arm, arms)} and {words.adapter(by_examples.arm, arms)}, "
        f"{_verdict(by_rewards, by_examples)}."
        for by_rewards, by_examples in _pairs(common.rows)
    ]


def _pairs(rows: Sequence[ArmRow]) -> list[tuple[ArmRow, ArmRow]]:
    """Returns the arms that differ in rewards or examples alone, at equal rates upwards."""
    by_arm = {row.arm: row for row in rows}
    pairs = []
    for rewards, examples in _PAIRS:
        for arm in sorted(by_arm, key=lambda arm: arm.learning_rate):
            other = arm._replace(method=examples)
            if arm.method == rewards and other in by_arm:
                pairs.append((by_arm[arm], by_arm[other]))
    return pairs


def _verdict(by_rewards: ArmRow, by_examples: ArmRow) -> str:
    """Returns the result of a pair, as far as the seeds tell."""
    pair = (by_rewards, by_examples)
    if not all(row.is_whole for row in pair):
        counts = [row.quality.n if row.quality else 0 for row in pair]
        of_all = [f"{n} of {len(row.runs)}" for n, row in zip(counts, pair, strict=True)]
        return f"{' and '.join(of_all)} runs reach it, too few to compare"
    gap = gap_of(by_rewards, by_examples)
    side = "less" if gap.value > 0 else "more"
    if gap.decides:
        return f"rewards move the model {side}, by {with_error(gap)}"
    if gap.is_separate:
        return f"{side} by rewards in every seed, but so few seeds do not tell them apart"
    return "the seeds do not tell their divergence apart"


def _divergence_at(run: RunResult, base: float, level: float) -> float | None:
    """Returns a run's divergence where its score first reaches a level; None where it never does.

    Between measurements, both are taken to be linear; before the first step, the divergence is 0.
    """
    moved = {point.step: point.value for point in run.divergences}
    curve: Sequence[tuple[Point, float]] = [
        (Point(0, base), 0.0),
        *((point, moved[point.step]) for point in run.scores if point.step in moved),
    ]
    for (before, divergence), (after, later) in itertools.pairwise(curve):
        if after.value >= level:
            share = (level - before.value) / (after.value - before.value)
            return divergence + share * (later - divergence)
    return None
