"""The intrinsic dimension d90: the smallest dimension that reaches 90% of the full score.

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

TARGET_SHARE = 0.9  # of full fine-tuning's score


class Dimension(NamedTuple):
    """The dimension that a method needs for `TARGET_SHARE` of full fine-tuning's score.

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
    _, full = tables.best_sides(rows)
    if full is None or full.quality is None or full.measure.kind != "score":
        return ()
    full_score = full.quality.mean
    target = TARGET_SHARE * full_score
    results: list[Dimension] = []
    for method in OF_SUBSPACE:
        method_rows = [row for row in rows if row.arm.method == method and row.quality]
        best_rows = tables.best_of_each(method_rows, lambda arm: arm.dimension)
        curve = tuple(sorted(best_rows, key=_dimension_of))
        if not curve:
            continue
        sizes = [_dimension_of(row) for row in curve if row.quality and row.quality.mean >= target]
        seeds = sorted({run.seed for row in curve for run in row.runs})
        crossings: list[float] = []
        for seed in seeds:
            crossing = _interpolate_dimension(_scores_by_dimension(curve, seed), target)
            if crossing is not None:
                crossings.append(crossing)
        result = Dimension(
            method=method,
            rows=curve,
            whole=full_score,
            target=target,
            smallest=sizes[0] if sizes else None,
            of_seeds=tuple(crossings),
        )
        results.append(result)
    return tuple(results)


def sentence(measured: Dimension, score: str) -> str:
    """Returns a sentence about an intrinsic dimension.

    Args:
      measured: the dimension.
      score: the name of the score.
    """
    method = words.method(measured.method)
    goal = (
        f"{TARGET_SHARE:.0%} of full fine-tuning's {score} ({words.figure(measured.target)} of "
        f"{words.figure(measured.whole)})"
    )
    sizes = [_dimension_of(row) for row in measured.rows]
    if measured.smallest is None:
        return f"{method} does not reach {goal} with up to {sizes[-1]:,} numbers."
    clause = f"{method} reaches {goal} with {measured.smallest:,} numbers"
    if measured.smallest == sizes[0]:
        return f"{clause}, the fewest that were tried: d90 may be smaller."
    low = min(measured.of_seeds, default=math.inf)
    high = max(measured.of_seeds, default=math.inf)
    low_text = f"{low:,.0f} or fewer" if low == sizes[0] else f"{low:,.0f}"
    high_text = f"{high:,.0f}" if math.isfinite(high) else f"beyond {sizes[-1]:,}"
    n_seeds = len(measured.of_seeds)
    range_text = f"{low_text} to {high_text} ({n_seeds} seeds)"
    if n_seeds == 1:
        range_text = f"{low_text} (one seed)"
    return f"{clause}. Between the dimensions tried, d90 is {range_text}."


def _dimension_of(row: ArmRow) -> int:
    return row.arm.dimension or 0


def _scores_by_dimension(curve: Sequence[ArmRow], seed: int) -> list[tuple[int, float]]:
    """Returns the dimensions and scores of a seed, from the smallest dimension on."""
    return [
        (_dimension_of(row), run.score)
        for row in curve
        for run in row.runs
        if run.seed == seed and run.status == "done" and run.score is not None
    ]


def _interpolate_dimension(points: Sequence[tuple[int, float]], target: float) -> float | None:
    """Returns the dimension at which a curve first reaches a score; None without points."""
    if not points:
        return None
    last_size: int | None = None
    last_score = 0.0
    for size, score in points:
        if score < target:
            last_size = size
            last_score = score
        elif last_size is None:  # the smallest dimension reaches it already
            return float(size)
        else:
            share = (target - last_score) / (score - last_score)
            return math.exp(math.log(last_size) + share * math.log(size / last_size))
    return math.inf
