"""The difference between two arms, beside its spread over seeds and over questions."""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from train.compare.reporting import words
from train.compare.reporting.tables import ArmRow, Spread
from train.compare.result import RunResult

UNKNOWN_SPREAD = 0.1  # the gap that decides where the spread over seeds is not known
LEVEL = 0.95
FEWEST = 6  # questions answered differently: with 5, a sign test (two-sided) has p = 0.0625
POWER = 0.8  # the share of comparisons in which a gap is to be told apart
MOST_SEEDS = 100


class Variance(NamedTuple):
    """The estimated variance of a mean, and the degrees of freedom of the estimate."""

    value: float
    freedom: int


class QuestionSpread(NamedTuple):
    """The spread of the paired difference of two arms over the questions that both answered.

    Attributes:
      n: number of questions.
      differing: number of questions whose means over the seeds differ.
      variance: variance of the mean difference.
    """

    n: int
    differing: int
    variance: Variance


class Gap(NamedTuple):
    """By how much an arm is better than another one; negative if it is worse.

    Attributes:
      value: the difference of the means.
      share: the value as a share of the larger mean.
      is_separate: whether every seed of one arm lies above every seed of the other.
      seeds: variance of each arm's mean over its seeds; empty if an arm has a single seed.
      questions: None where the results of single questions are not known.
    """

    value: float
    share: float
    is_separate: bool
    seeds: tuple[Variance, ...]
    questions: QuestionSpread | None

    @property
    def variances(self) -> list[Variance]:
        """Returns the variances of the gap that are known."""
        return [*self.seeds, *([self.questions.variance] if self.questions else [])]

    @property
    def error(self) -> float | None:
        """Returns half the width of the gap's interval; None if an arm has a single seed."""
        return half_width(self.variances) if self.seeds else None

    @property
    def spread_over(self) -> str:
        """Names the sources of the spread: "seeds and 64 questions"."""
        return f"seeds and {self.questions.n:,} questions" if self.questions else "seeds"

    @property
    def decides(self) -> bool:
        """Returns True if the gap is beyond the spread."""
        questions = self.questions
        if questions is not None and questions.differing < FEWEST:
            return False
        if not self.seeds:
            by_questions = half_width([questions.variance]) if questions else 0.0
            return abs(self.share) > UNKNOWN_SPREAD and abs(self.value) > by_questions
        if questions is None and not any(variance.value for variance in self.seeds):
            return False  # nothing was seen to vary
        return abs(self.value) > half_width(self.variances)

    @property
    def is_hidden(self) -> bool:
        """Returns True if a spread may hide a large lead of the other arm."""
        return bool(self.seeds) and not self.decides and self.share < -UNKNOWN_SPREAD


def gap_of(arm: ArmRow, other: ArmRow) -> Gap:
    """Returns the gap of an arm to another one; both have values."""
    one, two = arm.quality, other.quality
    assert one and two
    value = one.mean - two.mean if arm.measure.larger else two.mean - one.mean
    largest = max(abs(one.mean), abs(two.mean))
    return Gap(
        value=value,
        share=value / largest if largest else 0.0,
        is_separate=one.low > two.high or two.low > one.high,
        seeds=_seed_variances([one, two]),
        questions=_question_spread(arm, other),
    )


def with_error(gap: Gap) -> str:
    """Returns the size of a gap in words, with its error: "0.3 (± 0.1)"."""
    error = f" (± {words.rough(gap.error)})" if gap.error else ""
    return words.rough(abs(gap.value)) + error


def half_width(variances: Iterable[Variance]) -> float:
    """Returns half the width of the interval of a sum of means (Satterthwaite, 1946).

    Of two means over seeds alone, it is that of Welch (1947).
    """
    total, freedom = _sum_of(variances)
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(total) if total else 0.0


def seeds_to_decide(gap: Gap, n: int) -> int | None:
    """Returns the number of seeds at which a gap would be told apart; None if too many.

    Args:
      gap: what was observed, taken for the true difference.
      n: number of seeds of each arm.
    """

    def is_enough(seeds: int) -> bool:
        scaled = [Variance(x.value * (x.freedom + 1) / seeds, seeds - 1) for x in gap.seeds]
        return _is_likely(gap._replace(seeds=tuple(scaled)))

    return _smallest(range(n + 1, MOST_SEEDS + 1), is_enough) if gap.seeds else None


def questions_to_decide(gap: Gap, most: int) -> int | None:
    """Returns the number of questions at which a gap would be told apart; None if too many.

    Args:
      gap: what was observed, taken for the true difference.
      most: how many questions there are.
    """
    known = gap.questions
    if known is None or not gap.seeds:
        return None

    def is_enough(n: int) -> bool:
        differing = known.differing * n / known.n
        is_common = stats.poisson.sf(FEWEST - 1, differing) >= POWER
        return bool(is_common) and _is_likely(with_questions(gap, n))

    return _smallest(range(known.n + 1, most + 1), is_enough)


def with_questions(gap: Gap, n: int) -> Gap:
    """Returns the gap that so many questions like those that were asked would show."""
    known = gap.questions
    assert known is not None
    variance = Variance(known.variance.value * known.n / n, n - 1)
    return gap._replace(questions=QuestionSpread(n, known.differing * n // known.n, variance))


def _smallest(numbers: range, is_enough: Callable[[int], bool]) -> int | None:
    index = bisect.bisect_left(numbers, True, key=is_enough)
    return numbers[index] if index < len(numbers) else None


def _is_likely(gap: Gap) -> bool:
    """Returns True if a gap is told apart in `POWER` of the comparisons."""
    if gap.questions is not None and gap.questions.differing < FEWEST:
        return False
    total, freedom = _sum_of(gap.variances)
    if not total:
        return gap.questions is not None and bool(gap.value)
    bound = stats.t.ppf(0.5 + LEVEL / 2, freedom)
    return bool(stats.nct.sf(bound, freedom, abs(gap.value) / math.sqrt(total)) >= POWER)


def _sum_of(variances: Iterable[Variance]) -> tuple[float, float]:
    """Returns the sum of variances, and its degrees of freedom (Satterthwaite, 1946)."""
    parts = [part for part in variances if part.value]
    total = sum(part.value for part in parts)
    squares = sum(part.value**2 / part.freedom for part in parts)
    return total, total**2 / squares if squares else 0.0


def _seed_variances(spreads: Sequence[Spread]) -> tuple[Variance, ...]:
    if any(spread.deviation is None for spread in spreads):
        return ()
    return tuple(Variance((x.deviation or 0.0) ** 2 / x.n, x.n - 1) for x in spreads)


def _question_spread(arm: ArmRow, other: ArmRow) -> QuestionSpread | None:
    """Returns the spread over questions; None unless all runs answered the same ones."""
    sides = [
        [_results(run) for run in row.runs if row.measure.value(run) is not None]
        for row in (arm, other)
    ]
    lengths = {len(results) for side in sides for results in side}
    if arm.measure.kind != "score" or len(lengths) > 1 or min(lengths) == 0:
        return None
    means = [np.mean(side, axis=0) for side in sides]
    differences = means[0] - means[1]
    differences = differences[~np.isnan(differences)]
    n = len(differences)
    if n < 2:
        return None
    variance = Variance(float(np.var(differences, ddof=1)) / n, n - 1)
    return QuestionSpread(n, int(np.sum(np.abs(differences) > 1e-9)), variance)


def _results(run: RunResult) -> list[float]:
    return [math.nan if value is None else value for value in run.question_scores]
