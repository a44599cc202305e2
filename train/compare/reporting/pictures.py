"""Pictures of a comparison: PNGs that are legible at the width of a phone."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from train.compare.reporting import dimension, tables, words
from train.compare.reporting.tables import ArmRow, Figures, Spread
from train.compare.result import Arm, Comparison, Point

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
FULL, ADAPTERS = "#D55E00", ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#000000", "#E69F00")
MARKERS, DASHES = "osv^DPX*", ("-", "--", "-.", ":")
WIDTH = 4.6  # inches: at a phone's width, a point of type is about a pixel
_MOST_LINES = 7  # in one picture of curves; more cannot be told apart
STYLE: Any = {
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
}


class Picture(NamedTuple):
    """A PNG.

    Attributes:
      file: its name.
      title: what it shows.
      said: how to read it.
    """

    file: str
    title: str
    said: str


class _Plot(Figures):
    """Shares, among all pictures of one comparison, its rows, and a style for each of them."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(comparison)
        shown = tables.series_and_stopped(self.rows)
        # Other alphas and batch sizes stand in one picture alone: they come last.
        kinds = dict.fromkeys(row.arm.rate_group() for row in (*shown, *self.rows))
        methods = dict.fromkeys(kind.method for kind in kinds if kind.method != "full")
        self._colours = {m: ADAPTERS[i % len(ADAPTERS)] for i, m in enumerate(methods)}
        self._colours["full"] = FULL
        self._styles: dict[Arm, dict[str, Any]] = {}
        for kind in kinds:
            i = sum(other.method == kind.method for other in self._styles)
            self._styles[kind] = {
                "color": self.colour(kind.method),
                "marker": "s" if kind.method == "full" else MARKERS[i % 8],
                "linestyle": DASHES[(i + i // 8) % 4],
            }

    def colour(self, method: str) -> str:
        """Returns a method's colour, the same in all pictures."""
        return self._colours[method]

    def style(self, row: ArmRow) -> dict[str, Any]:
        """Returns colour, marker and dashes of a row: alike where the rate alone differs."""
        return self._styles[row.arm.rate_group()]

    def name(self, row: ArmRow) -> str:
        """Returns the name of a row's method, size and targets."""
        return "\n".join(textwrap.wrap(plain(self.adapter(row.arm)), 26))

    def draw_line(
        self, axes: Axes, rows: Sequence[ArmRow], at: Sequence[float], name: str | None = None
    ) -> None:
        """Draws the quality of rows, a line with bars; of a single one, a mark."""
        spreads = [row.quality for row in rows if row.quality]
        style = self.style(rows[0])
        line = {**style, "capsize": 3} if len(at) > 1 else _mark(style)
        name = name or self.name(rows[0])
        axes.errorbar(at, [x.mean for x in spreads], yerr=errors(spreads), label=name, **line)


def draw(comparison: Comparison, folder: Path) -> tuple[Picture, ...]:
    """Draws the pictures whose data was measured.

    Args:
      comparison: the measurements.
      folder: where the PNGs go.

    Returns:
      The pictures drawn.
    """
    drawing = _Plot(comparison)
    if not drawing.series:
        return ()
    pictures = []
    with rc_context(STYLE):
        for drawer in _DRAWERS:
            file = f"{drawer.__name__.lstrip('_')}.png"
            # Without pyplot there is no global state.
            figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
            if title_and_caption := drawer(drawing, figure):
                figure.savefig(folder / file)
                pictures.append(Picture(file, *title_and_caption))
    return tuple(pictures)


def _curves(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws a curve of each against the step, with a band over seeds.

    It is that of the held-out loss, else of the score, else of the loss in training.
    """
    chosen, facts = _few(tables.series_and_stopped(drawing.rows)), drawing.comparison.facts
    field, name = next(
        (field, name)
        for field, name in (
            ("held_out", f"held-out {facts.loss}"),
            ("scores", facts.score or "score"),
            ("losses", f"training {facts.loss}"),
        )
        if any(len(getattr(run, field)) > 1 for row in chosen for run in row.runs)
        or field == "losses"
    )
    axes = figure.subplots()
    for row in chosen:
        ended = [run for run in row.runs if run.status == "done"] or row.runs
        curves = [getattr(run, field) for run in ended]
        steps, low, mean, high = _seed_curves(curves)
        if len(steps) < 2:
            continue
        style = drawing.style(row)
        marks: dict[str, Any] = {"markersize": 4, "markevery": max(1, len(steps) // 8)}
        axes.plot(steps, mean, label=drawing.name(row), linewidth=1.6, **style, **marks)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
    if not axes.lines:
        return None
    _label(figure, axes, "step", name)
    return (
        f"{words.capital(name.partition(' (')[0])} by step",
        "Each adapter and full fine-tuning at its best learning rate. Lines are means over seeds, "
        "bands run from the lowest to the highest.",
    )


def _rates(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the quality against the learning rate, a line for each adapter and full.

    Where settings were stopped early, few are left at the end: their loss when all were compared.
    """
    if drawing.comparison.rungs:
        return _first_rung(drawing, figure)
    axes = figure.subplots()
    for rates in tables.rates(drawing.rows):
        ended = [row for row in rates.tried if row.quality]
        if len(ended) > 1:
            drawing.draw_line(axes, ended, [row.arm.learning_rate for row in ended])
    if not axes.lines:
        return None
    axes.set_xscale("log")
    _label(figure, axes, "peak learning rate", drawing.measure.name)
    return (
        f"{words.capital(drawing.measure.name)} by learning rate",
        "Marks are means over seeds, bars run from the lowest to the highest seed. A line whose "
        "best mark is at its end may have a better rate beyond.",
    )


def _first_rung(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    rung = drawing.comparison.rungs[0]
    values = {arm: value for arm, value in (*rung.kept, *rung.stopped) if math.isfinite(value)}
    axes = figure.subplots()
    for first in tables.series_and_stopped(drawing.rows):
        alike = first.arm.rate_group()
        line = [arm for arm in values if arm.rate_group() == alike]
        line.sort(key=lambda arm: arm.learning_rate)
        at, of = [arm.learning_rate for arm in line], [values[arm] for arm in line]
        if line:
            axes.plot(at, of, label=drawing.name(first), **drawing.style(first))
    if not axes.lines:
        return None
    axes.set_xscale("log")
    name = tables.decided_by(drawing.comparison.facts)
    _label(figure, axes, "peak learning rate", name)
    return (
        f"{words.capital(name.partition(' (')[0])} by learning rate, early",
        f"After {rung.share:.1%} of the steps, when all settings were compared and most of them "
        "stopped; means over seeds.",
    )


def _sizes(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the quality against the number of trained parameters, a line for each method."""
    ended = [row for row in drawing.series if row.quality and row.trained_parameters]
    if len(ended) < 2:
        return None
    axes, counts = figure.subplots(), {row.arm: row.trained_parameters or 0 for row in ended}
    ended.sort(key=lambda row: counts[row.arm])
    for group in tables.groups(ended, lambda arm: (arm.method, arm.targets)):
        name = words.family(group[0].arm, drawing.arms)
        drawing.draw_line(axes, group, [counts[row.arm] for row in group], name)
    _scale_of_counts(axes, list(counts.values()))
    _label(figure, axes, "trained parameters", drawing.measure.name)
    return (
        f"{words.capital(drawing.measure.name)} by trained parameters",
        "Each adapter and full fine-tuning at its best learning rate; bars run from the lowest to "
        "the highest seed.",
    )


def _dimension(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the score against the dimension of random subspaces, with full fine-tuning's."""
    measured = dimension.dimensions(drawing.comparison)
    if not measured:
        return None
    axes = figure.subplots()
    for each in measured:
        sizes = [row.arm.dimension or 0 for row in each.rows]
        drawing.draw_line(axes, each.rows, sizes, words.method(each.method))
    _scale_of_counts(axes, [row.arm.dimension or 0 for each in measured for row in each.rows])
    axes.axhline(measured[0].whole, color=FULL, label=words.method("full"))
    share = f"{dimension.SHARE:.0%} of it"
    axes.axhline(measured[0].target, color=FULL, linestyle="--", label=share)
    _label(figure, axes, "trained numbers d", drawing.measure.name)
    return (
        f"{words.capital(drawing.measure.name)} in random subspaces",
        "Each dimension at its best learning rate; marks are means over seeds, bars run from the "
        "lowest to the highest. Where a line crosses the dashes is d90, the intrinsic dimension.",
    )


def _costs(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws bars of time, memory and files, a panel each."""
    chosen = _few(drawing.series)
    panels: list[tuple[str, list[float], Callable[[float | None], str]]] = []
    for title, field, show in (
        ("step time", "step_seconds", words.seconds),
        ("step memory", "compiled_bytes", words.size),
        ("files of a task", "saved_bytes", words.size),
    ):
        values = [row.mean(field) or 0.0 for row in chosen]
        if sum(map(bool, values)) > 1:
            panels.append((title, values, show))
    if not panels:
        return None
    figure.set_size_inches(WIDTH, len(panels) * (0.6 + 0.32 * len(chosen)))
    every = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (title, values, shown) in zip(every, panels, strict=True):
        places = range(len(chosen))
        colours = [drawing.colour(row.arm.method) for row in chosen]
        axes.barh(places, values, color=colours, height=0.7)
        for at, value in zip(places, values, strict=True):
            axes.text(value, at, f" {shown(value or None)}", va="center", fontsize=10.5)
        axes.set_yticks(places, [drawing.name(row) for row in chosen])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max(values))
        axes.xaxis.set_major_locator(NullLocator())
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(False)
        axes.set_title(title, loc="left", fontsize=11.5)
    return (
        "Costs",
        "Each adapter and full fine-tuning at its best learning rate. Time and memory of a step "
        "are of one seed, run again alone. The size of files is a mean over seeds.",
    )


def _storage(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the bytes on disk against the number of tasks."""
    stored = tables.storage(drawing.comparison)
    if not stored:
        return None
    axes, (tasks, models, adapters) = figure.subplots(), zip(*stored, strict=True)
    axes.loglog(tasks, models, "s-", color=FULL, label="full models")
    top, _ = tables.best_sides(drawing.rows)
    assert top
    colour = drawing.colour(top.arm.method)
    axes.loglog(tasks, adapters, "o-", color=colour, label="one base and adapters")
    axes.set_xticks(tasks, [f"{n:,}" for n in tasks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.size(value)))
    _label(figure, axes, "tasks", "bytes on disk")
    return "Storage by number of tasks", "Both axes are logarithmic."


def _forgetting(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the rise of the loss outside the task."""
    every = [(row, row.spread_of("forgotten")) for row in drawing.series]
    measured = [(row, spread) for row, spread in every if spread]
    if not measured:
        return None
    figure.set_size_inches(WIDTH, 1.1 + 0.32 * len(measured))
    axes = figure.subplots()
    for at, (row, spread) in enumerate(measured):
        axes.errorbar(spread.mean, at, xerr=errors([spread]), **_mark(drawing.style(row)))
    axes.set_yticks(range(len(measured)), [drawing.name(row) for row, _ in measured])
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("rise of the loss\n(nats a token)")
    return (
        "Forgetting",
        "How much the loss on text outside the task rose in training; bars run from the lowest to "
        "the highest seed.",
    )


# Each draws the PNG that is called as it is: curves.png.
_DRAWERS = (_curves, _rates, _sizes, _dimension, _costs, _storage, _forgetting)


def errors(spreads: Sequence[Spread]) -> list[list[float]]:
    """Returns the lengths of error bars, from the lowest to the highest seed: [2, n]."""
    return [[x.mean - x.low for x in spreads], [x.high - x.mean for x in spreads]]


def _few(series: Sequence[ArmRow]) -> Sequence[ArmRow]:
    """Returns few enough rows to tell apart: the smallest, the largest, and some between."""
    whole = [row for row in series if row.is_full]
    others = [row for row in series if not row.is_full]
    kept = np.linspace(0, len(others) - 1, min(len(others), _MOST_LINES - len(whole)))
    return [*(others[i] for i in kept.round().astype(int)), *whole]


def _label(figure: Figure, axes: Axes, horizontal: str, vertical: str) -> None:
    """Names the axes, and the lines in a legend below them."""
    axes.set(xlabel=horizontal, ylabel=plain(vertical))
    figure.set_figheight(3.3 + add_legend(figure, [axes]))


def add_legend(figure: Figure, panels: Sequence[Axes]) -> float:
    """Adds one legend of all panels below them; returns its height in inches."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = 1 if max(map(len, handles)) > 24 else 2
    figure.legend(
        [*handles.values()], [*handles], loc="outside lower center", ncols=columns, fontsize=10.5
    )
    lines = sum(name.count("\n") + 1 for name in handles)
    return 0.2 * -(-lines // columns)


def plain(text: str) -> str:
    """Returns text in which a dollar begins no formula."""
    return text.replace("$", r"\$")


def _seed_curves(curves: Iterable[Sequence[Point]]) -> tuple[list[int], Any, Any, Any]:
    """Returns steps that all seeds measured, and lowest, mean and highest value at each."""
    of_seed: list[dict[int, float]] = [
        {point.step: point.value for point in curve if math.isfinite(point.value)}
        for curve in curves
        if curve
    ]
    steps = sorted(set[int]().union(*of_seed).intersection(*of_seed))
    values = np.array([[seed[step] for step in steps] for seed in of_seed or [{}]])
    return steps, values.min(0), values.mean(0), values.max(0)


def _scale_of_counts(axes: Axes, counts: Sequence[float]) -> None:
    """Makes the horizontal axis logarithmic, with ticks such as 200, 10k and 5M."""
    axes.set_xscale("log")
    is_narrow = max(counts) < 30 * min(counts)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _mark(style: dict[str, Any]) -> dict[str, Any]:
    return {**style, "linestyle": "none", "capsize": 3, "markersize": 7}
