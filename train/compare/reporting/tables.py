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
    """A measured value by which arms are compared.

    Attributes:
      kind: which value of a run it is.
      name: for people, with its unit.
      larger: whether a larger value is better.
    """

    kind: Literal["score", "held out", "training", "forgetting", "intruders", "divergence"]
    name: str
    larger: bool

    def value(self, run: RunResult) -> float | None:
        """Returns the value of a finished run; None for other runs and non-finite values."""
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
    """An arm with its runs of all seeds.

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
        """The spread of the criterion over the finished runs."""
        return spread(map(self.measure.value, self.runs))

    @property
    def trained_parameters(self) -> int | None:
        """The number of trained parameters; None if no run reports it."""
        counts = [run.trained_parameters for run in self.runs if run.trained_parameters]
        return counts[0] if counts else None

    def spread_of(self, field: str) -> Spread | None:
        """Returns the spread of a field of `RunResult` over the finished runs."""
        return spread(getattr(run, field) for run in self.runs if run.status == "done")

    def mean(self, field: str) -> float | None:
        """Returns the mean of a field of `RunResult` over the finished runs."""
        values = self.spread_of(field)
        return None if values is None else values.mean

    @property
    def order(self) -> tuple[bool, float, int]:
        """A sort key: the best row first, and among equals the one with fewer parameters."""
        value = 0.0 if self.quality is None else self.quality.mean
        sign = -1 if self.measure.larger else 1
        return self.quality is None, sign * value, self.trained_parameters or 0

    @property
    def is_whole(self) -> bool:
        """Returns True if every run finished with a finite value."""
        return self.quality is not None and self.quality.n == len(self.runs)

    @property
    def is_full(self) -> bool:
        """Returns True if the arm is full fine-tuning."""
        return self.arm.method == "full"

    @property
    def is_adapter(self) -> bool:
        """Returns True if the arm trains an adapter that can be recommended.

        One that trains a head alone has none; beside rewards, one of examples is no rival.
        """
        return self.arm.rank is not None and self.arm.method not in OF_EXAMPLES


class Figures:
    """The figures of a comparison, with names for its arms.

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
        """Returns the name of an arm."""
        return words.label(arm, self.arms)

    def adapter(self, arm: Arm) -> str:
        """Returns the name of an arm without its learning rate."""
        return words.adapter(arm, self.arms)


class Rates(NamedTuple):
    """The rows that differ only in their learning rates.

    Attributes:
      tried: the rows, by rate upwards.
      best: the index of the best of them.
    """

    tried: tuple[ArmRow, ...]
    best: int

    @property
    def edge(self) -> Literal["smallest", "largest", "only"] | None:
        """The end of the rates at which the best one lies; None if it lies between others."""
        if len(self.tried) == 1:
            return "only"
        if self.best == 0:
            return "smallest"
        return "largest" if self.best == len(self.tried) - 1 else None


class DiskUse(NamedTuple):
    """The disk space of a number of tasks, in bytes."""

    tasks: int
    full: float
    adapters: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """Returns the mean and the spread of the finite values; None if there are none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    low = min(finite)
    high = max(finite)
    mean = min(max(statistics.fmean(finite), low), high)  # rounding can put it outside
    return Spread(
        n=len(finite),
        mean=mean,
        low=low,
        high=high,
        deviation=statistics.stdev(finite) if len(finite) > 1 else None,
    )


def criteria(facts: ComparisonFacts) -> dict[str, Criterion]:
    """Returns all measures by their kinds, named as the facts of a comparison name them."""
    measures = (
        Criterion("score", facts.score or "score", larger=True),
        Criterion("held out", f"held-out {facts.loss}", larger=False),
        Criterion("training", f"training {facts.loss}", larger=False),
        Criterion("forgetting", "rise of the loss on other text (nats per token)", larger=False),
        Criterion("intruders", "intruder dimensions of a matrix", larger=False),
        Criterion("divergence", "divergence from the base (nats per token)", larger=False),
    )
    return {measure.kind: measure for measure in measures}


def decided_by(facts: ComparisonFacts) -> str:
    """Returns the name of the value by which unpromising runs are stopped early."""
    measures = criteria(facts)
    return measures["score" if facts.by_score else "held out"].name


def criterion_of(comparison: Comparison) -> Criterion:
    """Returns the criterion that arms are compared by.

    The task's score if each method has a run with one; else the held-out loss if each method has a
    run with one; else the loss in training.
    """
    measures = criteria(comparison.facts)
    ended_runs = [run for run in comparison.runs if run.status == "done"]
    methods = {run.arm.method for run in ended_runs}
    for measure in (measures["score"], measures["held out"]):
        measured_methods = {run.arm.method for run in ended_runs if measure.value(run) is not None}
        if methods and measured_methods == methods:
            return measure
    return measures["training"]


def rows(comparison: Comparison, measure: Criterion | None = None) -> tuple[ArmRow, ...]:
    """Returns a row for each arm in order of quality, with rows without a value last.

    Args:
      comparison: the measurements.
      measure: what its rows are sorted by; by default `criterion_of` the comparison.
    """
    return tuple(sorted(arm_rows(comparison, measure or criterion_of(comparison)), key=_row_order))


def arm_rows(comparison: Comparison, measure: Criterion) -> tuple[ArmRow, ...]:
    """Returns a row for each arm, in the order of their first runs."""
    runs_of_arm: dict[Arm, list[RunResult]] = {}
    for run in comparison.runs:
        runs_of_arm.setdefault(run.arm, []).append(run)
    return tuple(ArmRow(arm, tuple(runs), measure) for arm, runs in runs_of_arm.items())


def best(among: Iterable[ArmRow]) -> ArmRow | None:
    """Returns the best row, if possible one whose runs all finished."""
    measured_rows = [row for row in among if row.quality]
    whole_rows = [row for row in measured_rows if row.is_whole]
    return min(whole_rows or measured_rows, key=_row_order, default=None)


def best_sides(among: Iterable[ArmRow]) -> tuple[ArmRow | None, ArmRow | None]:
    """Returns the best row of the adapters, and the best row of full fine-tuning."""
    among = list(among)
    return best(row for row in among if row.is_adapter), best(row for row in among if row.is_full)


def best_of_each(among: Iterable[ArmRow], key: Callable[[Arm], Hashable]) -> tuple[ArmRow, ...]:
    """Returns the best row of each group, in the order in which groups first appear.

    Args:
      among: the rows.
      key: the group of an arm: by method, by method and rank, by targets.
    """
    chosen = map(best, groups(among, key))
    return tuple(row for row in chosen if row is not None)


def series(among: Iterable[ArmRow]) -> tuple[ArmRow, ...]:
    """Returns the best row of each method and size, sorted by size, with full fine-tuning last."""
    return tuple(sorted(best_of_each(among, _method_and_size), key=_series_key))


def series_and_stopped(among: Sequence[ArmRow]) -> tuple[ArmRow, ...]:
    """Returns `series`, with the longest-trained row of each method and size that none finished."""
    row_of_kind = {_method_and_size(row.arm): row for row in series(among)}
    for row in sorted(among, key=_progress_key):
        if any(run.held_out or run.scores or run.losses for run in row.runs):
            row_of_kind.setdefault(_method_and_size(row.arm), row)
    return tuple(sorted(row_of_kind.values(), key=_series_key))


def rates(among: Iterable[ArmRow]) -> tuple[Rates, ...]:
    """Returns the groups of rows that differ only in the learning rate, sorted by rank, full last.

    Runs that were stopped early or diverged count as tried, and are never the best.
    """
    groups_of_rates: list[Rates] = []
    for group in groups(filter(is_tried, among), Arm.rate_group):
        rows_by_rate = tuple(sorted(group, key=lambda row: row.arm.learning_rate))
        best_row = best(rows_by_rate)
        if best_row is not None:
            groups_of_rates.append(Rates(rows_by_rate, rows_by_rate.index(best_row)))
    return tuple(sorted(groups_of_rates, key=lambda arm_rates: _series_key(arm_rates.tried[0])))


def is_tried(row: ArmRow) -> bool:
    """Returns True if a run of the row finished, was stopped early, or diverged."""
    for run in row.runs:
        if run.status in ("done", "stopped early"):
            return True
        if run.status == "failed" and _has_diverged(run):
            return True
    return False


def rates_of(row: ArmRow, among: Iterable[ArmRow]) -> Rates:
    """Returns the learning rates that were tried for the arm of a row."""
    rate_group = row.arm.rate_group()
    (arm_rates,) = rates(other for other in among if other.arm.rate_group() == rate_group)
    return arm_rates


def rate_ratio(among: Iterable[ArmRow]) -> float | None:
    """Returns the learning rate of the best adapter over that of the best full fine-tuning."""
    adapter, full = best_sides(among)
    if adapter is None or full is None:
        return None
    return adapter.arm.learning_rate / full.arm.learning_rate


def storage(comparison: Comparison) -> tuple[DiskUse, ...]:
    """Returns the disk space of N tasks: N full models, or one base and N of the best adapter.

    The base counts as it is when saved in the form of a full model. Where that was not measured, it
    counts as a full model, which has the same arrays. Empty if the bytes of either side were not
    measured.
    """
    adapter, full = best_sides(row for row in rows(comparison) if row.mean("saved_bytes"))
    if adapter is None or full is None:
        return ()
    adapter_bytes = adapter.mean("saved_bytes") or 0.0
    model_bytes = full.mean("saved_bytes") or 0.0
    base_bytes = comparison.facts.base_saved_bytes or model_bytes
    return tuple(
        DiskUse(tasks=n, full=n * model_bytes, adapters=base_bytes + n * adapter_bytes)
        for n in TASKS
    )


def groups(among: Iterable[ArmRow], key: Callable[[Arm], Hashable]) -> Iterable[list[ArmRow]]:
    """Returns rows in groups, in the order in which groups first appear."""
    rows_by_key: dict[Hashable, list[ArmRow]] = {}
    for row in among:
        rows_by_key.setdefault(key(row.arm), []).append(row)
    return rows_by_key.values()


def _method_and_size(arm: Arm) -> tuple[Hashable, ...]:
    return arm.method, arm.rank, arm.targets, arm.dimension


def _series_key(row: ArmRow) -> tuple[bool, bool, int]:
    """Returns the key that sorts LoRA first and full last, and arms of a method by their size."""
    return row.is_full, row.arm.method != "lora", row.arm.rank or row.arm.dimension or 0


def _progress_key(row: ArmRow) -> tuple[float, float]:
    """Returns a sort key by the negative number of steps, and by the last loss or negative score.

    Of runs that are compared by their score, it is the negative score.
    """
    losses = [-run.scores[-1].value if run.scores else run.held_out_loss for run in row.runs]
    loss = spread(losses)
    mean_steps = statistics.fmean(run.steps for run in row.runs)
    return -mean_steps, loss.mean if loss else math.inf


def _has_diverged(run: RunResult) -> bool:
    """Returns True if a loss or a gradient of a run was not finite."""
    has_error = "finite" in (run.error or "")
    return has_error or any(not math.isfinite(point.value) for point in run.losses)


_row_order = operator.attrgetter("order")
