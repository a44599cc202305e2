"""The measurements of a comparison, aggregated over seeds and arms."""

import dataclasses
import functools
import math
import operator
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

from train.compare.options import OF_EXAMPLES
from train.compare.reporting import words
from train.compare.result import Arm, Comparison, ComparisonFacts, RunResult

TASKS = (1, 10, 100, 1000)  # how many tasks are stored


class Criterion(NamedTuple):
    """A value of runs that arms are compared by.

    Attributes:
      kind: which value of a run it is.
      name: for people, with its unit.
      larger: whether a larger value is better.
    """

    kind: Literal["score", "held out", "training", "forgetting", "intruders", "divergence"]
    name: str
    larger: bool

    def value(self, run: RunResult) -> float | None:
        """Returns the value of a run that ended; None for others, and where it is not finite."""
        value = getattr(run, _FIELDS[self.kind]) if run.status == "done" else None
        return value if value is not None and math.isfinite(value) else None


_FIELDS = {
    "score": "score",
    "held out": "held_out_loss",
    "training": "training_loss",
    "forgetting": "forgotten",
    "intruders": "intruders",
    "divergence": "divergence",
}


class Spread(NamedTuple):
    """Values of several seeds.

    Attributes:
      n: how many there are.
      mean, low, high: mean, least and greatest of them.
      deviation: their standard deviation (n - 1 in the denominator); None for a single one.
    """

    n: int
    mean: float
    low: float
    high: float
    deviation: float | None


@dataclasses.dataclass(frozen=True)
class ArmRow:
    """An arm over its seeds.

    Attributes:
      arm: the arm.
      runs: its runs.
      measure: the value of a run that says how good it is.
    """

    arm: Arm
    runs: tuple[RunResult, ...]
    measure: Criterion

    @functools.cached_property
    def quality(self) -> Spread | None:
        """The spread of the measure; runs that ended count alone."""
        return spread(map(self.measure.value, self.runs))

    @property
    def trained_parameters(self) -> int | None:
        """The number of parameters that a run trained; None if no run says so."""
        return next((n for run in self.runs if (n := run.trained_parameters)), None)

    def spread_of(self, field: str) -> Spread | None:
        """Returns the spread of a field of `RunResult` over the runs that ended."""
        return spread(getattr(run, field) for run in self.runs if run.status == "done")

    def mean(self, field: str) -> float | None:
        """Returns the mean of a field of `RunResult` over the runs that ended."""
        values = self.spread_of(field)
        return values and values.mean

    @property
    def order(self) -> tuple[bool, float, int]:
        """A key that sorts the best row first; of equals, that with fewer parameters."""
        value = 0.0 if self.quality is None else self.quality.mean
        sign = -1 if self.measure.larger else 1
        return self.quality is None, sign * value, self.trained_parameters or 0

    @property
    def is_whole(self) -> bool:
        """Returns True if every run ended with a finite value."""
        return self.quality is not None and self.quality.n == len(self.runs)

    @property
    def is_full(self) -> bool:
        """Returns True if the arm is full fine-tuning."""
        return self.arm.method == "full"

    @property
    def is_adapter(self) -> bool:
        """Returns True if the arm has an adapter to recommend.

        One that trains a head alone has none; beside rewards, one of examples is no rival.
        """
        return self.arm.rank is not None and self.arm.method not in OF_EXAMPLES


class Figures:
    """The figures of a comparison, and names of its arms that tell as much as differs.

    Attributes:
      comparison: the measurements.
      measure: what arms are compared by.
      rows: the arms, the best first.
      series: the best of each method and size.
      arms: the arms of the rows.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.measure = criterion_of(comparison)
        self.rows = rows(comparison)
        self.series = series(self.rows)
        self.arms = [row.arm for row in self.rows]

    def label(self, arm: Arm) -> str:
        """Names an arm."""
        return words.label(arm, self.arms)

    def adapter(self, arm: Arm) -> str:
        """Names an arm without its learning rate."""
        return words.adapter(arm, self.arms)


class Rates(NamedTuple):
    """The learning rates of arms that differ in nothing else.

    Attributes:
      tried: the rows, by rate upwards.
      best: the index of the best of them.
    """

    tried: tuple[ArmRow, ...]
    best: int

    @property
    def edge(self) -> Literal["smallest", "largest", "only"] | None:
        """Names the end at which the best rate lies; None if it has neighbours on both sides."""
        if len(self.tried) == 1:
            return "only"
        return {0: "smallest", len(self.tried) - 1: "largest"}.get(self.best)  # type: ignore[return-value]


class DiskUse(NamedTuple):
    """The size of a number of tasks on disk, in bytes."""

    tasks: int
    full: float
    adapters: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """Returns mean and spread of the values that are there and finite; None without any."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    deviation = statistics.stdev(finite) if len(finite) > 1 else None
    low, high = min(finite), max(finite)
    mean = min(max(statistics.fmean(finite), low), high)  # rounding can put it outside
    return Spread(len(finite), mean, low, high, deviation)


def criteria(facts: ComparisonFacts) -> dict[str, Criterion]:
    """Returns all measures by their kinds, named as the facts of a comparison name them."""
    every = (
        Criterion("score", facts.score or "score", True),
        Criterion("held out", f"held-out {facts.loss}", False),
        Criterion("training", f"training {facts.loss}", False),
        Criterion("forgetting", "rise of the loss on other text (nats a token)", False),
        Criterion("intruders", "intruder dimensions of a matrix", False),
        Criterion("divergence", "divergence from the base (nats a token)", False),
    )
    return {measure.kind: measure for measure in every}


def decided_by(facts: ComparisonFacts) -> str:
    """Returns the name of the value by which hopeless runs are stopped early."""
    known = criteria(facts)
    return known["score" if facts.by_score else "held out"].name


def criterion_of(comparison: Comparison) -> Criterion:
    """Returns the criterion that arms are compared by.

    The task's score if each method has a run with one; else the held-out loss if each method has a
    run with one; else the loss in training.
    """
    known = criteria(comparison.facts)
    done = [run for run in comparison.runs if run.status == "done"]
    sides = {run.arm.method for run in done}
    for measure in (known["score"], known["held out"]):
        if sides and sides == {run.arm.method for run in done if measure.value(run) is not None}:
            return measure
    return known["training"]


def rows(comparison: Comparison, measure: Criterion | None = None) -> tuple[ArmRow, ...]:
    """Returns a row for each arm, the best first and those without a value last.

    Args:
      comparison: the measurements.
      measure: what its rows are sorted by; by default `criterion_of` the comparison.
    """
    return tuple(sorted(arm_rows(comparison, measure or criterion_of(comparison)), key=_order))


def arm_rows(comparison: Comparison, measure: Criterion) -> tuple[ArmRow, ...]:
    """Returns a row for each arm, in the order of their first runs."""
    of_arm: dict[Arm, list[RunResult]] = {}
    for run in comparison.runs:
        of_arm.setdefault(run.arm, []).append(run)
    return tuple(ArmRow(arm, tuple(runs), measure) for arm, runs in of_arm.items())


def best(among: Iterable[ArmRow]) -> ArmRow | None:
    """Returns the best row: of those whose every seed ended, if there are any."""
    measured = [row for row in among if row.quality]
    return min([row for row in measured if row.is_whole] or measured, key=_order, default=None)


def best_sides(among: Iterable[ArmRow]) -> tuple[ArmRow | None, ArmRow | None]:
    """Returns the best row of an adapter, and the best of full fine-tuning."""
    among = list(among)
    return best(row for row in among if row.is_adapter), best(row for row in among if row.is_full)


def best_of_each(among: Iterable[ArmRow], key: Callable[[Arm], Hashable]) -> tuple[ArmRow, ...]:
    """Returns the best row of each group, in the order of the groups' first rows.

    Args:
      among: the rows.
      key: the group of an arm: by method, by method and rank, by targets.
    """
    chosen = map(best, groups(among, key))
    return tuple(row for row in chosen if row is not None)


def series(among: Iterable[ArmRow]) -> tuple[ArmRow, ...]:
    """Returns the best row of each method and size; by rank or dimension, full last."""
    return tuple(sorted(best_of_each(among, _kind), key=_place))


def series_and_stopped(among: Sequence[ArmRow]) -> tuple[ArmRow, ...]:
    """Returns `series`, and where no run of a kind ended, the arm that got furthest and lowest."""
    row_of_kind = {_kind(row.arm): row for row in series(among)}
    for row in sorted(among, key=_last):
        if any(run.held_out or run.scores or run.losses for run in row.runs):
            row_of_kind.setdefault(_kind(row.arm), row)
    return tuple(sorted(row_of_kind.values(), key=_place))


def rates(among: Iterable[ArmRow]) -> tuple[Rates, ...]:
    """Returns the rates of arms that differ in nothing else; adapters by rank, full last.

    Runs that were stopped early or diverged count as tried, and are never the best.
    """
    groups_of_rates = []
    for group in groups(filter(is_tried, among), Arm.rate_group):
        tried = tuple(sorted(group, key=lambda row: row.arm.learning_rate))
        if (top := best(tried)) is not None:
            groups_of_rates.append(Rates(tried, tried.index(top)))
    return tuple(sorted(groups_of_rates, key=lambda tried_rates: _place(tried_rates.tried[0])))


def is_tried(row: ArmRow) -> bool:
    """Returns True if a run of the row says something of its quality: it ended, or diverged."""
    return any(
        run.status in ("done", "stopped early") or (run.status == "failed" and _diverged(run))
        for run in row.runs
    )


def rates_of(row: ArmRow, among: Iterable[ArmRow]) -> Rates:
    """Returns the rates that were tried where a row's arm is the best."""
    alike = row.arm.rate_group()
    (group,) = rates(candidate for candidate in among if candidate.arm.rate_group() == alike)
    return group


def rate_ratio(among: Iterable[ArmRow]) -> float | None:
    """Returns the learning rate of the best adapter over that of the best full fine-tuning."""
    adapter, full = best_sides(among)
    if adapter is None or full is None:
        return None
    return adapter.arm.learning_rate / full.arm.learning_rate


def storage(comparison: Comparison) -> tuple[DiskUse, ...]:
    """Returns the disk use of N tasks: N full models, or one base and N of the best adapter.

    The base counts as it is when saved in the form of a full model. Where that was not measured, it
    counts as a full model, which has the same arrays. Empty if the bytes of either side were not
    measured.
    """
    adapter, full = best_sides(row for row in rows(comparison) if row.mean("saved_bytes"))
    if adapter is None or full is None:
        return ()
    small, large = adapter.mean("saved_bytes") or 0.0, full.mean("saved_bytes") or 0.0
    base = comparison.facts.base_saved_bytes or large
    return tuple(DiskUse(n, n * large, base + n * small) for n in TASKS)


def groups(among: Iterable[ArmRow], key: Callable[[Arm], Hashable]) -> Iterable[list[ArmRow]]:
    """Returns rows in groups, in the order of the groups' first rows."""
    rows_by_key: dict[Hashable, list[ArmRow]] = {}
    for row in among:
        rows_by_key.setdefault(key(row.arm), []).append(row)
    return rows_by_key.values()


def _kind(arm: Arm) -> tuple[Hashable, ...]:
    return arm.method, arm.rank, arm.targets, arm.dimension


def _place(row: ArmRow) -> tuple[bool, bool, int]:
    return row.is_full, row.arm.method != "lora", row.arm.rank or row.arm.dimension or 0


def _last(row: ArmRow) -> tuple[float, float]:
    """Returns the negative number of steps, and the last held-out loss; means over seeds.

    Of runs that are compared by their score, it is the negative score.
    """
    lost = [-run.scores[-1].value if run.scores else run.held_out_loss for run in row.runs]
    mean = spread(lost)
    return -statistics.fmean(run.steps for run in row.runs), mean.mean if mean else math.inf


def _diverged(run: RunResult) -> bool:
    return "finite" in (run.error or "") or any(not math.isfinite(at.value) for at in run.losses)


_order = operator.attrgetter("order")
