"""The measurements of a comparison, aggregated over seeds and arms."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

from train.compare.result import Arm, Comparison, Measured

TASKS = (1, 10, 100, 1000)  # how many tasks are stored


class Measure(NamedTuple):
    """A value of runs that arms are compared by.

    Attributes:
      kind: which value of a run it is.
      name: for people, with its unit.
      larger: whether a larger value is better.
    """

    kind: Literal["score", "held out", "training", "forgetting", "intruders"]
    name: str
    larger: bool

    def of(self, run: Measured) -> float | None:
        """Returns the value of a run that ended; None for others, and where it is not finite."""
        if run.status != "done":
            return None
        last = run.losses[-1].value if run.losses else None
        of = {"score": run.score, "held out": run.held_out_loss, "training": last}
        lost = run.forgetting
        of |= {"forgetting": lost and lost.after - lost.before, "intruders": run.intruders}
        value = of[self.kind]
        return value if value is not None and math.isfinite(value) else None

    def is_better(self, one: float, other: float) -> bool:
        """Returns whether one value is better than the other."""
        return one > other if self.larger else one < other


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRow:
    """An arm over its seeds; None is what was not measured.

    Attributes:
      arm: the arm.
      runs: its runs.
      quality: by the comparison's measure; runs that ended count alone.
      score, held_out_loss: values of runs that ended.
      forgetting: how much the loss on text outside the task rose.
      intruders: intruder dimensions of a matrix.
      trained_parameters: a run's.
      saved_bytes, compiled_bytes, peak_bytes, step_seconds, seconds: means over runs that ended.
    """

    arm: Arm
    runs: tuple[Measured, ...]
    quality: Spread | None
    score: Spread | None
    held_out_loss: Spread | None
    forgetting: Spread | None
    intruders: Spread | None
    trained_parameters: int | None
    saved_bytes: float | None
    compiled_bytes: float | None
    peak_bytes: float | None
    step_seconds: float | None
    seconds: float | None

    @property
    def is_whole(self) -> bool:
        """Returns whether every run ended with a finite value."""
        return self.quality is not None and self.quality.n == len(self.runs)

    @property
    def is_full(self) -> bool:
        """Returns whether the arm is full fine-tuning."""
        return self.arm.method == "full"

    @property
    def is_adapter(self) -> bool:
        """Returns whether the arm has an adapter. One that trains a head alone has none."""
        return self.arm.rank is not None


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
        """Says which of the rates the best one is; None if it has neighbours on both sides."""
        if len(self.tried) == 1:
            return "only"
        return {0: "smallest", len(self.tried) - 1: "largest"}.get(self.best)  # type: ignore[return-value]


class Stored(NamedTuple):
    """The size of a number of tasks on disk, in bytes."""

    tasks: int
    full: float
    adapters: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """Returns mean and spread of the values that are there and finite; None without any."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return None
    deviation = statistics.stdev(found) if len(found) > 1 else None
    low, high = min(found), max(found)
    mean = min(max(statistics.fmean(found), low), high)  # rounding can put it outside
    return Spread(len(found), mean, low, high, deviation)


def measure_of(comparison: Comparison) -> Measure:
    """Returns what arms are compared by.

    The task's score if each method has a run with one; else the held-out loss if each method has a
    run with one; else the loss in training.
    """
    facts = comparison.facts
    score = Measure("score", facts.score or "score", True)
    held_out = Measure("held out", f"held-out {facts.loss}", False)
    done = [run for run in comparison.runs if run.status == "done"]
    sides = {run.arm.method for run in done}
    for measure in (score, held_out):
        measured = {run.arm.method for run in done if measure.of(run) is not None}
        if sides and measured == sides:
            return measure
    return Measure("training", f"training {facts.loss}", False)


def rows(comparison: Comparison, measure: Measure | None = None) -> tuple[ArmRow, ...]:
    """Returns a row for each arm, the best first and those without a value last.

    Args:
      comparison: the measurements.
      measure: its rows' quality; by default `measure_of` the comparison.
    """
    measure = measure or measure_of(comparison)
    of_arm: dict[Arm, list[Measured]] = {}
    for run in comparison.runs:
        of_arm.setdefault(run.arm, []).append(run)
    return tuple(sorted((_row(arm, of_arm[arm], measure) for arm in of_arm), key=_order(measure)))


def best(among: Iterable[ArmRow], measure: Measure) -> ArmRow | None:
    """Returns the best row: of those whose every seed ended, if there are any."""
    found = [row for row in among if row.quality]
    return min([row for row in found if row.is_whole] or found, key=_order(measure), default=None)


def best_of_each(
    among: Iterable[ArmRow], key: Callable[[Arm], Hashable], measure: Measure
) -> tuple[ArmRow, ...]:
    """Returns the best row of each group, in the order of the groups' first rows.

    Args:
      among: the rows.
      key: the group of an arm: by method, by method and rank, by targets.
      measure: what is compared.
    """
    groups: dict[Hashable, list[ArmRow]] = {}
    for row in among:
        groups.setdefault(key(row.arm), []).append(row)
    chosen = (best(group, measure) for group in groups.values())
    return tuple(row for row in chosen if row is not None)


def series(among: Iterable[ArmRow], measure: Measure) -> tuple[ArmRow, ...]:
    """Returns the best row of each method and size; by rank or dimension, full last."""
    return tuple(sorted(best_of_each(among, _kind, measure), key=_place))


def with_stopped(among: Sequence[ArmRow], measure: Measure) -> tuple[ArmRow, ...]:
    """Returns `series`, and where no run of a kind ended, the arm that got furthest and lowest."""
    found = {_kind(row.arm): row for row in series(among, measure)}
    for row in sorted(among, key=_last):
        if any(run.held_out or run.losses for run in row.runs):
            found.setdefault(_kind(row.arm), row)
    return tuple(sorted(found.values(), key=_place))


def rates(among: Iterable[ArmRow], measure: Measure) -> tuple[Rates, ...]:
    """Returns the rates of arms that differ in nothing else; adapters by rank, full last.

    Runs that were stopped early or diverged count as tried, and are never the best.
    """
    groups: dict[Arm, list[ArmRow]] = {}
    for row in among:
        groups.setdefault(row.arm.at_any_rate(), []).append(row)
    found = []
    for group in groups.values():
        tried = sorted(group, key=lambda row: row.arm.learning_rate)
        tried = [row for row in tried if is_tried(row)]
        top = best(tried, measure)
        if top is not None:
            found.append(Rates(tuple(tried), tried.index(top)))
    return tuple(sorted(found, key=lambda one: _place(one.tried[0])))


def is_tried(row: ArmRow) -> bool:
    """Returns whether a run of the row says something of its quality: it ended, or diverged."""
    return any(
        run.status in ("done", "stopped early") or (run.status == "failed" and _diverged(run))
        for run in row.runs
    )


def rates_of(row: ArmRow, among: Iterable[ArmRow], measure: Measure) -> Rates:
    """Returns the rates that were tried where a row's arm is the best."""
    alike = row.arm.at_any_rate()
    group = [one for one in among if one.arm.at_any_rate() == alike]
    (found,) = rates(group, measure)
    return found


def rate_ratio(among: Sequence[ArmRow], measure: Measure) -> float | None:
    """Returns how many times full fine-tuning's best learning rate the best adapter's is."""
    top_full = best((row for row in among if row.is_full), measure)
    top = best((row for row in among if row.is_adapter), measure)
    if top is None or top_full is None:
        return None
    return top.arm.learning_rate / top_full.arm.learning_rate


def storage(comparison: Comparison, tasks: Sequence[int] = TASKS) -> tuple[Stored, ...]:
    """Returns what tasks take on disk: N full models, or one base and N of the best adapter.

    Empty if the bytes of either were not measured.
    """
    measure, found = measure_of(comparison), rows(comparison)
    top = best((row for row in found if row.is_adapter and row.saved_bytes), measure)
    whole = best((row for row in found if row.is_full and row.saved_bytes), measure)
    if top is None or whole is None:
        return ()
    adapter, model = top.saved_bytes or 0.0, whole.saved_bytes or 0.0
    return tuple(Stored(n, n * model, comparison.facts.base_bytes + n * adapter) for n in tasks)


def _row(arm: Arm, runs: Sequence[Measured], measure: Measure) -> ArmRow:
    done = [run for run in runs if run.status == "done"]

    def mean(of: Callable[[Measured], float | None]) -> float | None:
        found = spread(map(of, done))
        return found and found.mean

    forgotten = (run.forgetting for run in done)
    return ArmRow(
        arm=arm,
        runs=tuple(runs),
        quality=spread(map(measure.of, runs)),
        score=spread(run.score for run in done),
        held_out_loss=spread(run.held_out_loss for run in done),
        forgetting=spread(one.after - one.before for one in forgotten if one),
        intruders=spread(run.intruders for run in done),
        trained_parameters=next((n for run in runs if (n := run.trained_parameters)), None),
        saved_bytes=mean(lambda run: run.saved_bytes),
        compiled_bytes=mean(lambda run: run.compiled_bytes),
        peak_bytes=mean(lambda run: run.peak_bytes),
        step_seconds=mean(lambda run: run.step_seconds),
        seconds=mean(lambda run: run.seconds),
    )


def _kind(arm: Arm) -> tuple[Hashable, ...]:
    return arm.method, arm.rank, arm.targets, arm.dimension


def _place(row: ArmRow) -> tuple[bool, bool, int]:
    return row.is_full, row.arm.method != "lora", row.arm.rank or row.arm.dimension or 0


def _last(row: ArmRow) -> tuple[float, float]:
    """Returns the negative number of steps, and the last held-out loss; means over seeds."""
    steps = spread(run.steps for run in row.runs)
    loss = spread(run.held_out_loss for run in row.runs)
    return -steps.mean if steps else 0.0, loss.mean if loss else math.inf


def _diverged(run: Measured) -> bool:
    return "finite" in (run.error or "") or any(not math.isfinite(one.value) for one in run.losses)


def _order(measure: Measure) -> Callable[[ArmRow], tuple[bool, float, int]]:
    """Returns a key by which the best row comes first; of equals, that with fewer parameters."""

    def key(row: ArmRow) -> tuple[bool, float, int]:
        value = 0.0 if row.quality is None else row.quality.mean
        return row.quality is None, -value if measure.larger else value, row.trained_parameters or 0

    return key
