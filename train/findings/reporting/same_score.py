"""Compares the divergence of training on rewards and on examples at the same score."""

import dataclasses
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
    """A comparison of divergences at the score that all methods reach.

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
    best_rows = tables.best_of_each(tables.rows(comparison), lambda arm: arm.method)
    baselines = [*comparison.facts.baselines.values()]
    if not baselines or not any(run.divergences for run in comparison.runs):
        return None
    base_score = baselines[0]
    lowest_score = min(row.quality.mean for row in best_rows if row.quality)
    if lowest_score <= base_score:
        return None
    level = base_score + SHARE * (lowest_score - base_score)
    runs: list[RunResult] = []
    for run in comparison.runs:
        value = _divergence_at(run, base_score, level)
        points = () if value is None else (Point(run.steps, value),)
        runs.append(dataclasses.replace(run, divergences=points))
    divergence = tables.criteria(comparison.facts)["divergence"]
    name = f"{divergence.name} where the {comparison.facts.score} first reaches {level:.3f}"
    return CommonScore(
        level=level,
        comparison=dataclasses.replace(comparison, runs=tuple(runs)),
        measure=divergence._replace(name=name),
    )


def sentences(comparison: Comparison) -> list[str]:
    """Returns a sentence for each pair of rewards and examples with equal rates; [] for none."""
    common = common_score(comparison)
    if common is None:
        return []
    arms = [row.arm for row in common.rows]
    score_text = f"{comparison.facts.score} reaches {common.level:.3f}"
    verdicts: list[str] = []
    for reward_row, example_row in _pairs(common.rows):
        rate = shown(reward_row.arm.learning_rate)
        reward_name = words.adapter(reward_row.arm, arms)
        example_name = words.adapter(example_row.arm, arms)
        verdicts.append(
            f"At the rate {rate} for both, where the {score_text}: {reward_name} and "
            f"{example_name}, {_verdict(reward_row, example_row)}."
        )
    return verdicts


def _pairs(rows: Sequence[ArmRow]) -> list[tuple[ArmRow, ArmRow]]:
    """Returns the pairs of arms that differ only in rewards or examples, by ascending rate."""
    row_of_arm = {row.arm: row for row in rows}
    pairs: list[tuple[ArmRow, ArmRow]] = []
    for reward_method, example_method in _PAIRS:
        for arm in sorted(row_of_arm, key=lambda arm: arm.learning_rate):
            example_arm = arm._replace(method=example_method)
            if arm.method == reward_method and example_arm in row_of_arm:
                pairs.append((row_of_arm[arm], row_of_arm[example_arm]))
    return pairs


def _verdict(by_rewards: ArmRow, by_examples: ArmRow) -> str:
    """Returns the result of comparing a pair, if the seeds decide it."""
    if not by_rewards.is_whole or not by_examples.is_whole:
        counts: list[str] = []
        for row in (by_rewards, by_examples):
            n_reaching = row.quality.n if row.quality else 0
            counts.append(f"{n_reaching} of {len(row.runs)}")
        return f"{' and '.join(counts)} runs reach it, too few to compare"
    gap = gap_of(by_rewards, by_examples)
    side = "less" if gap.value > 0 else "more"
    if gap.decides:
        return f"rewards move the model {side}, by {with_error(gap)}"
    if gap.is_separate:
        return f"{side} by rewards in every seed, but so few seeds do not tell them apart"
    return "the seeds do not tell their divergence apart"


def _divergence_at(run: RunResult, base_score: float, level: float) -> float | None:
    """Returns a run's divergence when its score first reaches a level; None if it never does.

    Between measurements, both are taken to be linear; before the first step, the divergence is 0.
    """
    divergence_of_step = {point.step: point.value for point in run.divergences}
    last_score = base_score
    last_divergence = 0.0
    for point in run.scores:
        if point.step not in divergence_of_step:
            continue
        score = point.value
        divergence = divergence_of_step[point.step]
        if score >= level:
            share = (level - last_score) / (score - last_score)
            return last_divergence + share * (divergence - last_divergence)
        last_score = score
        last_divergence = divergence
    return None
