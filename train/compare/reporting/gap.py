"""The difference between two arms, beside its spread over seeds and over questions."""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from train.compare.reporting import words
from train.compare.reporting.tables import ArmRow, Spread

UNKNOWN_SPREAD = 0.1  # the gap that decides where the spread over seeds is not known
LEVEL = 0.95
MIN_DIFFERING_QUESTIONS = 6  # with 5, a two-sided sign test has p = 0.0625
POWER = 0.8  # the share of comparisons in which a gap must decide
MAX_SEEDS = 100


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
    """The advantage of one arm over another one; negative if the arm is worse.

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
        """The known variances of the gap."""
        return [*self.seeds, *([self.questions.variance] if self.questions else [])]

    @property
    def error(self) -> float | None:
        """Returns half the width of the gap's interval; None if an arm has a single seed."""
        return half_width(self.variances) if self.seeds else None

    @property
    def spread_over(self) -> str:
        """The sources of the spread as text: "seeds and 64 questions"."""
        return f"seeds and {self.questions.n:,} questions" if self.questions else "seeds"

    @property
    def decides(self) -> bool:
        """Returns True if the gap is beyond the spread."""
        questions = self.questions
        if questions is not None and questions.differing < MIN_DIFFERING_QUESTIONS:
            return False
        # With a single seed, the spread over seeds is unknown: the gap must be large.
        if not self.seeds:
            question_error = half_width([questions.variance]) if questions else 0.0
            return abs(self.share) > UNKNOWN_SPREAD and abs(self.value) > question_error
        # Seeds that all agree show no spread, so they say nothing about chance.
        is_spread_known = questions is not None or any(seed.value for seed in self.seeds)
        return is_spread_known and abs(self.value) > half_width(self.variances)

    @property
    def is_hidden(self) -> bool:
        """Returns True if a spread may hide a large lead of the other arm."""
        return bool(self.seeds) and not self.decides and self.share < -UNKNOWN_SPREAD


def gap_of(arm: ArmRow, other: ArmRow) -> Gap:
    """Returns the gap between two arms that both have values."""
    quality = arm.quality
    other_quality = other.quality
    assert quality and other_quality
    difference = quality.mean - other_quality.mean
    if not arm.measure.larger:
        difference = other_quality.mean - quality.mean
    larger_mean = max(abs(quality.mean), abs(other_quality.mean))
    return Gap(
        value=difference,
        share=difference / larger_mean if larger_mean else 0.0,
        is_separate=quality.low > other_quality.high or other_quality.low > quality.high,
        seeds=_seed_variances([quality, other_quality]),
        questions=_question_spread(arm, other),
    )


def with_error(gap: Gap) -> str:
    """Returns the size of a gap as text, with its error: "0.3 (± 0.1)"."""
    error = f" (± {words.rough(gap.error)})" if gap.error else ""
    return words.rough(abs(gap.value)) + error


def half_width(variances: Iterable[Variance]) -> float:
    """Returns half the width of the interval of a sum of means (Satterthwaite, 1946).

    Of two means over seeds alone, it is that of Welch (1947).
    """
    total_variance, freedom = _sum_variances(variances)
    if not total_variance:
        return 0.0
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(total_variance)


def seeds_to_decide(gap: Gap, n_seeds: int) -> int | None:
    """Returns the smallest number of seeds that would probably decide a gap; None if too many.

    Args:
      gap: what was observed, taken for the true difference.
      n_seeds: number of seeds of each arm.
    """
    if not gap.seeds:
        return None

    def is_enough(n: int) -> bool:
        # Scale the variance of each mean to n seeds.
        variances: list[Variance] = []
        for mean_variance in gap.seeds:
            seed_variance = mean_variance.value * (mean_variance.freedom + 1)
            variances.append(Variance(seed_variance / n, n - 1))
        return _is_likely_to_decide(gap._replace(seeds=tuple(variances)))

    return _find_smallest_enough(range(n_seeds + 1, MAX_SEEDS + 1), is_enough)


def questions_to_decide(gap: Gap, n_available: int) -> int | None:
    """Returns the smallest number of questions that would probably decide a gap; None if too many.

    Args:
      gap: what was observed, taken for the true difference.
      n_available: number of questions that the task has.
    """
    questions = gap.questions
    if questions is None or not gap.seeds:
        return None

    def is_enough(n: int) -> bool:
        # Enough questions must differ, and the gap must exceed their spread, both with `POWER`.
        expected_differing = questions.differing * n / questions.n
        min_differing = MIN_DIFFERING_QUESTIONS
        differing_probability = stats.poisson.sf(min_differing - 1, expected_differing)
        return differing_probability >= POWER and _is_likely_to_decide(with_questions(gap, n))

    return _find_smallest_enough(range(questions.n + 1, n_available + 1), is_enough)


def with_questions(gap: Gap, n: int) -> Gap:
    """Returns the gap with the question spread that n questions of the same kind would have."""
    questions = gap.questions
    assert questions is not None
    variance = Variance(questions.variance.value * questions.n / n, n - 1)
    n_differing = questions.differing * n // questions.n
    return gap._replace(questions=QuestionSpread(n=n, differing=n_differing, variance=variance))


def _find_smallest_enough(counts: range, is_enough: Callable[[int], bool]) -> int | None:
    """Returns the smallest count that is enough, by bisection; None if none is."""
    index = bisect.bisect_left(counts, True, key=is_enough)
    return counts[index] if index < len(counts) else None


def _is_likely_to_decide(gap: Gap) -> bool:
    """Returns True if a gap of this size decides with probability `POWER`."""
    if gap.questions is not None and gap.questions.differing < MIN_DIFFERING_QUESTIONS:
        return False
    total_variance, freedom = _sum_variances(gap.variances)
    if not total_variance:
        return gap.questions is not None and bool(gap.value)
    critical_value = stats.t.ppf(0.5 + LEVEL / 2, freedom)
    noncentrality = abs(gap.value) / math.sqrt(total_variance)
    return bool(stats.nct.sf(critical_value, freedom, noncentrality) >= POWER)


def _sum_variances(variances: Iterable[Variance]) -> tuple[float, float]:
    """Returns the sum of variances, and its degrees of freedom (Satterthwaite, 1946)."""
    terms = [variance for variance in variances if variance.value]
    total = sum(term.value for term in terms)
    weighted_squares = sum(term.value**2 / term.freedom for term in terms)
    freedom = total**2 / weighted_squares if weighted_squares else 0.0
    return total, freedom


def _seed_variances(spreads: Sequence[Spread]) -> tuple[Variance, ...]:
    """Returns the variance of each mean over seeds; () if one of them has a single seed."""
    variances: list[Variance] = []
    for spread in spreads:
        if spread.deviation is None:
            return ()
        variances.append(Variance(spread.deviation**2 / spread.n, spread.n - 1))
    return tuple(variances)


def _question_spread(arm: ArmRow, other: ArmRow) -> QuestionSpread | None:
    """Returns the spread over questions; None unless all runs answered the same ones."""
    scores = _question_scores(arm)
    other_scores = _question_scores(other)
    question_counts = {len(run_scores) for run_scores in (*scores, *other_scores)}
    is_known = len(question_counts) == 1 and 0 not in question_counts
    if arm.measure.kind != "score" or not is_known:
        return None
    differences = np.mean(scores, axis=0) - np.mean(other_scores, axis=0)
    differences = differences[~np.isnan(differences)]  # of questions that all runs answered
    n = len(differences)
    if n < 2:
        return None
    return QuestionSpread(
        n=n,
        differing=int(np.sum(np.abs(differences) > 1e-9)),
        variance=Variance(float(np.var(differences, ddof=1)) / n, n - 1),
    )


def _question_scores(row: ArmRow) -> list[list[float]]:
    """Returns the score of each question in each run that ended; NaN for questions without one."""
    scores_of_runs: list[list[float]] = []
    for run in row.runs:
        if row.measure.value(run) is not None:
            scores = [math.nan if score is None else score for score in run.question_scores]
            scores_of_runs.append(scores)
    return scores_of_runs
