"""The divergence of each method from the base, where it reaches the same score."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from train.compare.reporting import tables, words
from train.compare.reporting.tables import Figures, Spread
from train.compare.result import Arm, Comparison, Point, RunResult

SHARE = 0.9  # of the way from the base's score to the best that every method reaches


class Distance(NamedTuple):
    """An arm at the common score.

    Attributes:
      arm: a method's best.
      reached: how many of its runs reach the score.
      runs: how many it has.
      divergence: over the runs that reach it; None for none.
    """

    arm: Arm
    reached: int
    runs: int
    divergence: Spread | None


def distances(comparison: Comparison) -> tuple[float, tuple[Distance, ...]] | None:
    """Returns the common score, and each method's divergence from the base there.

    It is `SHARE` of the way from the base's score to the lowest of the methods' best. None where
    the divergence was not measured, the base's score is not known, or some method learned nothing.
    """
    best = tables.best_of_each(Figures(comparison).rows, lambda arm: arm.method)
    base = next(iter(comparison.facts.baselines.values()), None)
    if base is None or not any(run.divergences for row in best for run in row.runs):
        return None
    lowest = min(row.quality.mean for row in best if row.quality)
    if lowest <= base:
        return None
    level = base + SHARE * (lowest - base)
    measured = []
    for row in best:
        there = [_divergence_at(run, base, level) for run in row.runs]
        known = [value for value in there if value is not None]
        measured.append(Distance(row.arm, len(known), len(there), tables.spread(known)))
    return level, tuple(measured)


def sentence(comparison: Comparison) -> str | None:
    """Returns the distances in words; None where there are none."""
    found = distances(comparison)
    if found is None:
        return None
    level, measured = found
    parts = []
    for arm, reached, runs, divergence in measured:
        some = f", {reached} of {runs} runs" if reached < runs else ""
        value = "never"
        if divergence is not None:
            low, mean, high = (
                words.figure(x) for x in (divergence.low, divergence.mean, divergence.high)
            )
            value = f"{mean} ({low}–{high}{some})"
        parts.append(f"{words.label(arm, [each.arm for each in measured])}: {value}")
    score = comparison.facts.score or "score"
    return (
        f"Divergence from the base, in nats a token, where the {score} reaches {level:.3f} "
        f"({SHARE:.0%} of the way from the base's to what each method reaches): "
        f"{'; '.join(parts)}."
    )


def _divergence_at(run: RunResult, base: float, level: float) -> float | None:
    """Returns a run's divergence where its score first reaches a level; None where it never does.

    Between measurements, both are taken to be linear; before the first step, the divergence is 0.
    """
    moved = {point.step: point.value for point in run.divergences}
    curve: Sequence[tuple[Point, float]] = [
        (Point(0, base), 0.0),
        *((point, moved[point.step]) for point in run.scores if point.step in moved),
    ]
    for (before, at), (after, then) in itertools.pairwise(curve):
        if after.value >= level:
            share = (level - before.value) / (after.value - before.value)
            return at + share * (then - at)
    return None
