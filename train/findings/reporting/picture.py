"""The picture of a finding: what its tables show, a panel for each."""

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.compare.reporting.pictures import ADAPTERS, DASHES, FULL, MARKERS, STYLE, WIDTH, errors
from train.findings.reporting.pivot import Block, Key, Pivot, headed, shown

PICTURE = "finding.png"
_PANEL = 2.9  # inches
_LINE = 0.24  # of the legend
_A_LINE = {4: 7, 3: 12, 2: 24, 1: math.inf}  # entries of the legend, and letters of the longest
_ROW_OF_LABELS = 48  # letters below a panel, at most, with the longest label for each
_LABEL = 28  # letters beside a panel
_APART = 0.06  # of the distance between rows, so that bars of several columns do not hide another


def write(pivot: Pivot, folder: Path) -> str | None:
    """Draws the picture into a folder; returns its name, or None where there is nothing to draw."""
    with rc_context(STYLE):
        figure = figure_of(pivot)
        if figure is None:
            return None
        figure.savefig(folder / PICTURE)
    return PICTURE


def figure_of(pivot: Pivot) -> Figure | None:
    """Returns a figure with a panel for each table: means, with bars over the seeds.

    Rows stand at equal distances, as in the table, which a learning rate's usual steps nearly are
    on a logarithmic axis.
    """
    blocks = [block for block in pivot.blocks if any(cell.quality for cell in block.cells.values())]
    if not blocks:
        return None
    columns = list(dict.fromkeys(column for block in blocks for column in block.columns))
    figure = Figure(layout="constrained")  # no pyplot: no global state
    panels = figure.subplots(len(blocks), squeeze=False, sharey=True)[:, 0]
    for axes, block in zip(panels, blocks, strict=True):
        _draw(axes, block, pivot, columns)
    handles: dict[str, Artist] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    longest = max(map(len, handles))
    a_line = next(n for n, most in _A_LINE.items() if longest <= most)
    figure.legend(
        [*handles.values()],
        [*handles],
        loc="outside lower center",
        ncols=min(a_line, len(handles)),
        fontsize=10.5,
    )
    height = _PANEL * len(blocks) + _LINE * -(-len(handles) // a_line)
    figure.set_size_inches(WIDTH, height)
    return figure


def _draw(axes: Axes, block: Block, pivot: Pivot, columns: list[Key]) -> None:
    for column in block.columns:
        i = columns.index(column)
        pairs = [(at, block.cells.get((row, column))) for at, row in enumerate(block.rows)]
        points = [(at, cell.quality) for at, cell in pairs if cell and cell.quality]
        if not points:
            continue
        joined = all(not isinstance(block.rows[at], str) for at, _ in points)
        shift = _APART * (block.columns.index(column) - (len(block.columns) - 1) / 2)
        is_full = column == "full"
        axes.errorbar(
            [at + shift for at, _ in points],
            [value.mean for _, value in points],
            yerr=errors([value for _, value in points]),
            label=headed(pivot.columns, column),
            color=FULL if is_full else ADAPTERS[i % len(ADAPTERS)],
            marker="s" if is_full else MARKERS[i % len(MARKERS)],
            linestyle=DASHES[i // len(ADAPTERS) % len(DASHES)] if joined else "none",
            capsize=3,
            markersize=5,
        )
    labels = [shown(row) for row in block.rows]
    is_long = max(map(len, labels)) * len(labels) > _ROW_OF_LABELS
    turned: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    axes.set_xticks(range(len(labels)), labels, **turned)
    axes.set_xlim(-0.5, len(block.rows) - 0.5)
    name = textwrap.fill(pivot.measure.name, _LABEL).replace("$", r"\$")
    axes.set(xlabel=pivot.rows.name, ylabel=name)
    if block.title:
        axes.set_title(block.title.replace("$", r"\$"), loc="left", fontsize=11.5)
