"""Turns a comparison into tables whose rows, columns and blocks are settings."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from train.compare.reporting import tables, words
from train.compare.reporting.tables import ArmRow, Criterion
from train.compare.result import Arm, Comparison
from train.console.errors import UserError

MEASURES = ("score", "loss", "forgetting", "intruders", "divergence")
Key = float | str  # a setting's value; the method's name for arms without such a setting


class TableAxis(NamedTuple):
    """A setting of arms, or their size, for the rows, columns or blocks of a table.

    Attributes:
      name: for people.
      of: returns the value of an arm.
      short: stands before a number in the head of a column: "rank" for "rank 8".
    """

    name: str
    of: Callable[[ArmRow], Key]
    short: str


@dataclasses.dataclass(frozen=True)
class PivotLayout:
    """The rows, columns and values of a table.

    Attributes:
      rows, columns: names of `AXES`; several with " × ", such as "targets × rank".
      blocks: further axes, a table for each combination. Axes without which two arms would share a
        cell are added.
      at_best_rate: whether arms that differ in their learning rate alone are one, at the best;
        those without a value are left out.
      best_of_cell: the same of all arms that would share a cell.
    """

    rows: str
    columns: str
    blocks: tuple[str, ...] = ()
    at_best_rate: bool = False
    best_of_cell: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """One table of the layout.

    Attributes:
      title: what its arms have in common, in words; "" for the only table.
      rows, columns: the values along both axes, numbers upwards, then names.
      cells: the arms that were run, by (row, column).
    """

    title: str
    rows: tuple[Key, ...]
    columns: tuple[Key, ...]
    cells: dict[tuple[Key, Key], ArmRow]

    def best(self, column: Key, measure: Criterion) -> set[Key]:
        """Returns the rows with the best mean in a column, which are several if means are equal."""
        means: dict[Key, float] = {}
        for row in self.rows:
            cell = self.cells.get((row, column))
            if cell and cell.quality:
                means[row] = cell.quality.mean
        if not means:
            return set()
        best_mean = max(means.values()) if measure.larger else min(means.values())
        return {row for row, mean in means.items() if mean == best_mean}


@dataclasses.dataclass(frozen=True)
class Pivot:
    """A comparison in tables, by one measure.

    Attributes:
      measure: which value of a run it shows.
      rows, columns: the axes.
      blocks: the tables.
    """

    measure: Criterion
    rows: TableAxis
    columns: TableAxis
    blocks: tuple[Block, ...]


def _or_method(of: Callable[[Arm], Key | None]) -> Callable[[ArmRow], Key]:
    """Returns the key function of an axis: the result of `of`, or the method's name for None."""

    def value(row: ArmRow) -> Key:
        key = of(row.arm)
        if key is None:
            return "full" if row.is_full else words.method(row.arm.method)
        return key

    return value


AXES = {
    axis.name: axis
    for axis in (
        TableAxis("method", _or_method(lambda arm: None), ""),
        TableAxis("targets", _or_method(lambda arm: " + ".join(arm.targets or ()) or None), ""),
        TableAxis("rank", _or_method(lambda arm: arm.rank), "rank"),
        TableAxis("alpha", _or_method(lambda arm: arm.alpha), "alpha"),
        TableAxis("dimension", _or_method(lambda arm: arm.dimension), "dimension"),
        TableAxis("batch size", lambda row: row.arm.batch_size, "batch"),
        TableAxis("learning rate", lambda row: row.arm.learning_rate, "rate"),
        TableAxis("trained parameters", lambda row: row.trained_parameters or 0, ""),
    )
}


def axis_of(name: str) -> TableAxis:
    """Returns the axis of a name; "a × b" is the combination of two axes.

    Raises:
      UserError: a name is none of `AXES`.
    """
    names = name.split(" × ")
    for axis_name in names:
        if axis_name not in AXES:
            raise UserError(
                f"{axis_name!r} is not an axis of a table. Choose from {', '.join(AXES)}."
            )
    axes = [AXES[axis_name] for axis_name in names]
    if len(axes) == 1:
        return axes[0]

    def combined_key(row: ArmRow) -> str:
        return ", ".join(dict.fromkeys(headed(axis, axis.of(row)) for axis in axes))

    return TableAxis(", ".join(names), combined_key, "")


def measures_of(comparison: Comparison) -> dict[str, Criterion]:
    """Returns the measures for which some run has a value, by the names of `MEASURES`."""
    criteria = tables.criteria(comparison.facts)
    measures: dict[str, Criterion] = {}
    for name in MEASURES:
        measure = criteria["held out" if name == "loss" else name]
        if any(measure.value(run) is not None for run in comparison.runs):
            measures[name] = measure
    return measures


def pivot_of(comparison: Comparison, layout: PivotLayout, measure: Criterion) -> Pivot:
    """Returns the tables of a comparison.

    Args:
      comparison: the measurements.
      layout: what stands where.
      measure: which value of the runs to show.

    Raises:
      UserError: the layout names no axis.
    """
    arms = tables.arm_rows(comparison, measure)
    if layout.at_best_rate:
        best = tables.best_of_each(arms, Arm.rate_group)
        arms = tuple(row for row in arms if row in best)
    row_axis = axis_of(layout.rows)
    column_axis = axis_of(layout.columns)
    if layout.best_of_cell:
        cell_axes = [row_axis, column_axis, *map(axis_of, layout.blocks)]
        cell_of_arm = {row.arm: _position(row, cell_axes) for row in arms}
        arms = tables.best_of_each(arms, cell_of_arm.__getitem__)
    block_axes = _block_axes(arms, layout)
    rows_of_block: dict[tuple[Key, ...], list[ArmRow]] = {}
    for row in arms:
        rows_of_block.setdefault(_position(row, block_axes), []).append(row)
    blocks: list[Block] = []
    for position, block_rows in rows_of_block.items():
        titles = [headed(axis, key) for axis, key in zip(block_axes, position, strict=True)]
        block = Block(
            title=", ".join(titles),
            rows=_ordered(map(row_axis.of, block_rows)),
            columns=_ordered(map(column_axis.of, block_rows)),
            cells={(row_axis.of(row), column_axis.of(row)): row for row in block_rows},
        )
        blocks.append(block)
    return Pivot(measure=measure, rows=row_axis, columns=column_axis, blocks=tuple(blocks))


def _position(row: ArmRow, axes: Sequence[TableAxis]) -> tuple[Key, ...]:
    """Returns the value of an arm along each axis."""
    return tuple(axis.of(row) for axis in axes)


def shown(key: Key) -> str:
    """Returns a value as text in a table: "8", "3e-4", "attention"."""
    if isinstance(key, str):
        return key
    if key >= 0.1:
        return f"{key:,.0f}" if float(key).is_integer() else f"{key:g}"
    digits, _, power = f"{key:.6e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def headed(axis: TableAxis, key: Key) -> str:
    """Returns a value with the name of its axis: "rank 8", "full"."""
    return shown(key) if isinstance(key, str) or not axis.short else f"{axis.short} {shown(key)}"


def _block_axes(arms: Sequence[ArmRow], layout: PivotLayout) -> list[TableAxis]:
    """Returns the axes of the layout's blocks, and axes that separate arms with equal cells."""
    table_axes = [axis_of(layout.rows), axis_of(layout.columns)]
    block_axes = [axis_of(name) for name in layout.blocks]

    def n_positions(axes: Sequence[TableAxis]) -> int:
        return len({_position(row, [*table_axes, *axes]) for row in arms})

    for axis in AXES.values():
        n_cells = n_positions(block_axes)
        if n_cells < len(arms) and n_positions([*block_axes, axis]) > n_cells:
            block_axes.append(axis)
    return block_axes


def _ordered(keys: Iterable[Key]) -> tuple[Key, ...]:
    """Returns distinct keys: numbers in ascending order, and then texts in their given order."""
    distinct: Any = dict.fromkeys(keys)
    numbers = sorted(key for key in distinct if not isinstance(key, str))
    return (*numbers, *(key for key in distinct if isinstance(key, str)))
