"""The intrinsic dimension d90 of a comparison: how few numbers nearly do what all weights do.

Aghajanyan et al., arXiv 2012.13255: the smallest dimension of a random subspace in which training
reaches 90% of full fine-tuning's score.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from train.compare.options import OF_SUBSPACE
from train.compare.reporting import tables, words
from train.compare.reporting.tables import ArmRow
from train.compare.result import Comparison

SHARE = 0.9  # of full fine-tuning's score


class Dimension(NamedTuple):
    """The numbers that a method needs to reach `SHARE` of full fine-tuning's score.

    Attributes:
      method: "said" or "did".
      rows: the best row of each dimension, from the smallest on.
      whole: the mean score of full fine-tuning at its best.
      target: the score to reach.
      smallest: the smallest dimension tried whose mean score reaches it; None if none does.
      of_seeds: dimension of each seed at which its score crosses the target, between two
        dimensions by a straight line over log d; infinite for a seed that never does. A seed that
        reaches it at the smallest dimension tried may need fewer.
    """

    method: str
    rows: tuple[ArmRow, ...]
    whole: float
    target: float
    smallest: int | None
    of_seeds: tuple[float, ...]


def dimensions(comparison: Comparison) -> tuple[Dimension, ...]:
    """Returns the intrinsic dimension by each method that was run.

    Empty where there is no score, or full fine-tuning was not run to compare with.
    """
    rows = tables.rows(comparison)
    _, whole = tables.best_sides(rows)
    if whole is None or whole.quality is None or whole.measure.kind != "score":
        return ()
    target = SHARE * whole.quality.mean
    results = []
    for method in OF_SUBSPACE:
        own = [row for row in rows if row.arm.method == method and row.quality]
        by_size = tables.best_of_each(own, lambda arm: arm.dimension)
        curve = tuple(sorted(by_size, key=_size))
        if not curve:
            continue
        reach = (_size(row) for row in curve if row.quality and row.quality.mean >= target)
        seeds = sorted({run.seed for row in curve for run in row.runs})
        crossings = (_crossing(_points(curve, seed), target) for seed in seeds)
        of_seeds = tuple(crossing for crossing in crossings if crossing is not None)
        results.append(
            Dimension(method, curve, whole.quality.mean, target, next(reach, None), of_seeds)
        )
    return tuple(results)


def sentence(measured: Dimension, score: str) -> str:
    """Returns an intrinsic dimension in words.

    Args:
      one: the dimension.
      score: the name of the score.
    """
    who = words.method(measured.method)
    goal = (
        f"{SHARE:.0%} of full fine-tuning's {score} ({words.figure(measured.target)} of "
        f"{words.figure(measured.whole)})"
    )
    sizes = [_size(row) for row in measured.rows]
    if measured.smallest is None:
        return f"{who} does not reach {goal} with up to {sizes[-1]:,} numbers."
    low, high = min(measured.of_seeds, default=math.inf), max(measured.of_seeds, default=math.inf)
    beginning = f"{who} reaches {goal} with {measured.smallest:,} numbers"
    if measured.smallest == sizes[0]:
        return f"{beginning}, the fewest that were tried: d90 may be smaller."
    above = f"{high:,.0f}" if math.isfinite(high) else f"beyond {sizes[-1]:,}"
    below = f"{low:,.0f} or fewer" if low == sizes[0] else f"{low:,.0f}"
    n = len(measured.of_seeds)
    if n == 1:
        return f"{beginning}. Between the dimensions tried, d90 is {below} (one seed)."
    return f"{beginning}. Between the dimensions tried, d90 is {below} to {above} ({n} seeds)."


def _size(row: ArmRow) -> int:
    return row.arm.dimension or 0


def _points(curve: Sequence[ArmRow], seed: int) -> list[tuple[int, float]]:
    """Returns the dimensions and scores of a seed, from the smallest dimension on."""
    return [
        (_size(row), run.score)
        for row in curve
        for run in row.runs
        if run.seed == seed and run.status == "done" and run.score is not None
    ]


def _crossing(points: Sequence[tuple[int, float]], target: float) -> float | None:
    """Returns the dimension at which a curve first reaches a score; None without points."""
    if not points:
        return None
    before: tuple[int, float] | None = None
    for size, score in points:
        if score >= target:
            if before is None:
                return float(size)
            share = (target - before[1]) / (score - before[1])
            return math.exp(math.log(before[0]) + share * math.log(size / before[0]))
        before = size, score
    return math.inf
