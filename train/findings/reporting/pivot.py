"""Turns a comparison into tables: rows, columns and blocks, each an axis of its settings."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from train.compare.reporting import tables, words
from train.compare.reporting.tables import Measure, Spread, spread
from train.compare.result import Arm, Comparison, Measured
from train.console.errors import UserError

MEASURES = ("score", "loss", "forgetting", "intruders")
Key = float | str  # a setting's value; the method's name for arms without such a setting


class Axis(NamedTuple):
    """A setting of arms, or their size, along which a table has rows, columns or blocks.

    Attributes:
      name: for people.
      of: returns the value of an arm, of which it gets a run.
      short: stands before a number in the head of a column: "rank" for "rank 8".
    """

    name: str
    of: Callable[[Measured], Key]
    short: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Says what stands where in a table.

    Attributes:
      rows, columns: names of `AXES`; several with " × ", such as "targets × rank".
      blocks: further axes, a table for each combination. Axes without which two arms would share a
        cell are added.
      at_best_rate: whether arms that differ in their learning rate alone are one, at the best;
        those without a value are left out.
    """

    rows: str
    columns: str
    blocks: tuple[str, ...] = ()
    at_best_rate: bool = False


class Cell(NamedTuple):
    """The runs of an arm, aggregated.

    Attributes:
      runs: one for each seed.
      value: their spread by the table's measure; None if none ended with a finite value.
    """

    runs: tuple[Measured, ...]
    value: Spread | None


@dataclasses.dataclass(frozen=True)
class Block:
    """A table.

    Attributes:
      title: what its arms have in common, in words; "" for the only table.
      rows, columns: the values along both axes, numbers upwards, then names.
      cells: cells that were run, by (row, column).
    """

    title: str
    rows: tuple[Key, ...]
    columns: tuple[Key, ...]
    cells: dict[tuple[Key, Key], Cell]

    def best(self, column: Key, measure: Measure) -> set[Key]:
        """Returns the rows in which a column's mean is the best; several if they are equal."""
        found = {
            row: cell.value.mean
            for row in self.rows
            if (cell := self.cells.get((row, column))) and cell.value
        }
        if not found:
            return set()
        top = (max if measure.larger else min)(found.values())
        return {row for row, mean in found.items() if mean == top}


@dataclasses.dataclass(frozen=True)
class Pivot:
    """A comparison by one measure, in tables.

    Attributes:
      measure: which value of a run it shows.
      rows, columns: the axes.
      blocks: the tables.
    """

    measure: Measure
    rows: Axis
    columns: Axis
    blocks: tuple[Block, ...]


def short_method(name: str) -> str:
    """Returns a method's name for the head of a column."""
    return "full" if name == "full" else words.method(name)


def _or_method(of: Callable[[Arm], Key | None]) -> Callable[[Measured], Key]:
    def value(run: Measured) -> Key:
        found = of(run.arm)
        return short_method(run.arm.method) if found is None else found

    return value


AXES = {
    axis.name: axis
    for axis in (
        Axis("method", lambda run: short_method(run.arm.method), ""),
        Axis(
            "targets", _or_method(lambda arm: " + ".join(arm.targets) if arm.targets else None), ""
        ),
        Axis("rank", _or_method(lambda arm: arm.rank), "rank"),
        Axis("alpha", _or_method(lambda arm: arm.alpha), "alpha"),
        Axis("dimension", _or_method(lambda arm: arm.dimension), "dimension"),
        Axis("batch size", lambda run: run.arm.batch_size, "batch"),
        Axis("learning rate", lambda run: run.arm.learning_rate, "rate"),
        Axis("trained parameters", lambda run: run.trained_parameters or 0, ""),
    )
}


def axis_of(name: str) -> Axis:
    """Returns an axis by its name; of several with " × " between, their combinations.

    Raises:
      UserError: a name is none of `AXES`.
    """
    names = name.split(" × ")
    for one in names:
        if one not in AXES:
            raise UserError(f"{one!r} is no axis of a table: choose of {', '.join(AXES)}")
    if len(names) == 1:
        return AXES[name]
    axes = [AXES[one] for one in names]

    def of(run: Measured) -> str:
        return ", ".join(dict.fromkeys(headed(axis, axis.of(run)) for axis in axes))

    return Axis(", ".join(names), of, "")


def measures_of(comparison: Comparison) -> dict[str, Measure]:
    """Returns the measures that some run ended with, by the names of `MEASURES`."""
    known = tables.measures(comparison.facts)
    kinds = {name: "held out" if name == "loss" else name for name in MEASURES}
    return {
        name: known[kind]
        for name, kind in kinds.items()
        if any(known[kind].of(run) is not None for run in comparison.runs)
    }


def pivot_of(comparison: Comparison, layout: Layout, measure: Measure) -> Pivot:
    """Returns a comparison in tables.

    Args:
      comparison: the measurements.
      layout: what stands where.
      measure: which value of the runs to show.

    Raises:
      UserError: the layout names no axis.
    """
    of_arm: dict[Arm, list[Measured]] = {}
    for run in comparison.runs:
        of_arm.setdefault(run.arm, []).append(run)
    if layout.at_best_rate:
        best = tables.best_of_each(tables.rows(comparison, measure), Arm.at_any_rate)
        kept = {row.arm for row in best}
        of_arm = {arm: runs for arm, runs in of_arm.items() if arm in kept}
    firsts = [runs[0] for runs in of_arm.values()]
    rows, columns = axis_of(layout.rows), axis_of(layout.columns)
    apart = _blocks_of(firsts, layout)
    keys = list(dict.fromkeys(tuple(axis.of(run) for axis in apart) for run in firsts))
    blocks = []
    for key in keys:
        inside = [run for run in firsts if tuple(axis.of(run) for axis in apart) == key]
        cells = {}
        for first in inside:
            runs = tuple(sorted(of_arm[first.arm], key=lambda run: run.seed))
            value = spread(map(measure.of, runs))
            cells[rows.of(first), columns.of(first)] = Cell(runs, value)
        blocks.append(
            Block(
                title=", ".join(
                    headed(axis, value) for axis, value in zip(apart, key, strict=True)
                ),
                rows=_ordered(map(rows.of, inside)),
                columns=_ordered(map(columns.of, inside)),
                cells=cells,
            )
        )
    return Pivot(measure, rows, columns, tuple(blocks))


def shown(key: Key) -> str:
    """Returns a value as a table has it: "8", "3e-4", "attention"."""
    if isinstance(key, str):
        return key
    if key >= 0.1:
        return f"{key:,.0f}" if float(key).is_integer() else f"{key:g}"
    digits, _, power = f"{key:.6e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def headed(axis: Axis, key: Key) -> str:
    """Returns a value with its axis: "rank 8", "full"."""
    return shown(key) if isinstance(key, str) or not axis.short else f"{axis.short} {shown(key)}"


def _blocks_of(firsts: Sequence[Measured], layout: Layout) -> list[Axis]:
    """Returns the axes of the blocks: those asked for, and those that keep arms apart.

    Args:
      firsts: a run of each arm.
      layout: what was asked for.
    """
    inside = [axis_of(layout.rows), axis_of(layout.columns)]
    chosen = [axis_of(name) for name in layout.blocks]

    def places(axes: Sequence[Axis]) -> int:
        return len({tuple(axis.of(run) for axis in axes) for run in firsts})

    for axis in AXES.values():
        if places([*inside, *chosen]) == len(firsts):
            break
        if places([*inside, *chosen, axis]) > places([*inside, *chosen]):
            chosen.append(axis)
    return chosen


def _ordered(keys: Iterable[Key]) -> tuple[Key, ...]:
    """Returns the numbers upwards, then the names as they come, each once."""
    found: Any = dict.fromkeys(keys)
    numbers = sorted(key for key in found if not isinstance(key, str))
    return (*numbers, *(key for key in found if isinstance(key, str)))
