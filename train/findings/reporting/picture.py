"""Draws the picture of a finding: its claim, and a panel for each block of its layout."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.compare.reporting import words
from train.compare.reporting.pictures import (
    ADAPTERS,
    DASHES,
    FULL,
    MARKERS,
    STYLE,
    WIDTH,
    add_legend,
    errors,
    plain,
)
from train.compare.reporting.tables import Spread
from train.findings.reporting.pivot import Block, Key, Pivot, headed, shown

PICTURE = "finding.png"
_PANEL = 2.9  # inches
_ROW_OF_LABELS = 48  # letters below a panel, at most, with the longest label for each
_LABEL = 28  # letters beside a panel
_NEAREST = 0.04  # of the axis: the least distance between two ticks


def write(pivot: Pivot, folder: Path) -> str | None:
    """Draws the picture into a folder.

    Returns:
      A link to it as GitHub's Markdown has it; None where there is nothing to draw.
    """
    with rc_context(STYLE):
        figure = figure_of(pivot)
        if figure is None:
            return None
        figure.savefig(folder / PICTURE)
    return f"![{words.capital(pivot.measure.name)} by {pivot.rows.name}]({PICTURE})"


def figure_of(pivot: Pivot) -> Figure | None:
    """Returns a figure with a panel for each table: means, with bars over the seeds.

    All panels have the same axes. Rows that are numbers stand by their values on a logarithmic
    axis, joined within a column. Rows that are names, such as full fine-tuning among dimensions,
    are horizontal lines, to compare the others with.
    """
    blocks = [block for block in pivot.blocks if any(cell.quality for cell in block.cells.values())]
    if not blocks:
        return None
    columns: dict[Key, None] = {}
    numbers: set[float] = set()
    for block in blocks:
        columns |= dict.fromkeys(block.columns)
        numbers |= {row for row in block.rows if not isinstance(row, str)}
    figure = Figure(layout="constrained")  # no pyplot: no global state
    grid = figure.subplots(len(blocks), squeeze=False, sharex=True, sharey=True)
    panels: list[Axes] = [*grid[:, 0]]
    for axes, block in zip(panels, blocks, strict=True):
        _draw_table(axes, block, pivot, [*columns])
    _place_ticks(panels[-1], sorted(numbers))
    panels[-1].set_xlabel(pivot.rows.name)
    figure.set_size_inches(WIDTH, _PANEL * len(blocks) + add_legend(figure, panels))
    return figure


def _draw_table(axes: Axes, block: Block, pivot: Pivot, columns: list[Key]) -> None:
    """Draws a table: a line of means for each column, and horizontal lines for named rows."""
    for column in block.columns:
        style = _line_style(column, columns)
        label = headed(pivot.columns, column)
        spread_of_number: dict[float, Spread] = {}
        spreads_of_names: list[Spread] = []
        for row in block.rows:
            cell = block.cells.get((row, column))
            if cell is None or not cell.quality:
                continue
            if isinstance(row, str):
                spreads_of_names.append(cell.quality)
            else:
                spread_of_number[row] = cell.quality
        if spread_of_number:
            spreads = [*spread_of_number.values()]
            means = [spread.mean for spread in spreads]
            axes.errorbar([*spread_of_number], means, yerr=errors(spreads), label=label, **style)
        for spread in spreads_of_names:
            # A mean is a horizontal line, and its seeds are a band.
            axes.axhline(spread.mean, color=style["color"], label=label)
            axes.axhspan(spread.low, spread.high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_ylabel(plain(textwrap.fill(pivot.measure.name, _LABEL)))
    if block.title:
        axes.set_title(plain(block.title), loc="left", fontsize=11.5)


def _line_style(column: Key, columns: list[Key]) -> dict[str, Any]:
    """Returns colour, marker and dashes of a column, the same in all panels."""
    index = columns.index(column)
    is_full = column == "full"
    return {
        "color": FULL if is_full else ADAPTERS[index % len(ADAPTERS)],
        "marker": "s" if is_full else MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(ADAPTERS) % len(DASHES)],
        "capsize": 3,
        "markersize": 5,
    }


def _place_ticks(axes: Axes, numbers: Sequence[float]) -> None:
    """Makes the horizontal axis logarithmic, with a tick at each number that fits."""
    if not numbers:
        axes.set_xticks([])
        return
    axes.set_xscale("log")
    width = math.log(numbers[-1] / numbers[0])
    ticks = [numbers[0]]
    for number in numbers[1:]:
        if math.log(number / ticks[-1]) >= _NEAREST * width:
            ticks.append(number)
    labels = [shown(tick) for tick in ticks]
    is_long = max(map(len, labels)) * len(labels) > _ROW_OF_LABELS
    rotation: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    axes.set_xticks(ticks, labels, **rotation)
    axes.set_xticks([], minor=True)
