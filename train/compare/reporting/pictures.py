"""Pictures of a comparison: PNGs that are legible at the width of a phone."""

import math
import textwrap
from collections import Counter
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
from train.compare.result import Arm, Comparison, ComparisonFacts, Point

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
    """A PNG file with its title and caption.

    Attributes:
      file: its name.
      title: what it shows.
      said: how to read it.
    """

    file: str
    title: str
    said: str


class _Plot(Figures):
    """Holds the rows of a comparison and the style of each row, which all pictures share."""

    def __init__(self, comparison: Comparison) -> None:
        """Assigns a colour to each method, and a style to each group of rows."""
        super().__init__(comparison)
        drawn_rows = tables.series_and_stopped(self.rows)
        # Other alphas and batch sizes stand in one picture alone: they come last.
        rate_groups = dict.fromkeys(row.arm.rate_group() for row in (*drawn_rows, *self.rows))
        methods = dict.fromkeys(arm.method for arm in rate_groups if arm.method != "full")
        self._colours = {"full": FULL}
        for index, method in enumerate(methods):
            self._colours[method] = ADAPTERS[index % len(ADAPTERS)]
        self._styles: dict[Arm, dict[str, Any]] = {}
        n_styles: Counter[str] = Counter()  # of each method
        for arm in rate_groups:
            index = n_styles[arm.method]
            n_styles[arm.method] += 1
            self._styles[arm] = {
                "color": self.colour(arm.method),
                "marker": "s" if arm.method == "full" else MARKERS[index % 8],
                "linestyle": DASHES[(index + index // 8) % 4],
            }

    def colour(self, method: str) -> str:
        """Returns a method's colour, the same in all pictures."""
        return self._colours[method]

    def style(self, row: ArmRow) -> dict[str, Any]:
        """Returns a row's colour, marker and dashes, which do not depend on its learning rate."""
        return self._styles[row.arm.rate_group()]

    def name(self, row: ArmRow) -> str:
        """Returns the name of a row's method, size and targets."""
        return "\n".join(textwrap.wrap(plain(self.adapter(row.arm)), 26))

    def draw_line(
        self, axes: Axes, rows: Sequence[ArmRow], x: Sequence[float], name: str | None = None
    ) -> None:
        """Draws the quality of rows as a line with error bars; of a single row, as a point.

        Args:
          axes: the axes to draw on.
          rows: the rows, each with a quality.
          x: the horizontal position of each row.
          name: the line's name in the legend; by default that of the first row.
        """
        spreads = [row.quality for row in rows if row.quality]
        means = [spread.mean for spread in spreads]
        style = self.style(rows[0])
        line_style = {**style, "capsize": 3} if len(x) > 1 else _mark(style)
        label = name or self.name(rows[0])
        axes.errorbar(x, means, yerr=errors(spreads), label=label, **line_style)


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
            title_and_caption = drawer(drawing, figure)
            if title_and_caption:
                title, caption = title_and_caption
                figure.savefig(folder / file)
                pictures.append(Picture(file=file, title=title, said=caption))
    return tuple(pictures)


def _curves(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws each row's curve over the steps, with a band over the seeds.

    It is that of the held-out loss, else of the score, else of the loss in training.
    """
    rows = _select_few_rows(tables.series_and_stopped(drawing.rows))
    field, name = _curve_field(drawing.comparison.facts, rows)
    axes = figure.subplots()
    for row in rows:
        ended_runs = [run for run in row.runs if run.status == "done"]
        curves = [getattr(run, field) for run in ended_runs or row.runs]
        steps, low, mean, high = _seed_curves(curves)
        if len(steps) < 2:
            continue
        style = drawing.style(row)
        axes.plot(
            steps,
            mean,
            label=drawing.name(row),
            linewidth=1.6,
            markersize=4,
            markevery=max(1, len(steps) // 8),
            **style,
        )
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
    if not axes.lines:
        return None
    _label(figure, axes, "step", name)
    return (
        f"{words.capital(name.partition(' (')[0])} by step",
        "Each adapter and full fine-tuning at its best learning rate. Lines are means over seeds, "
        "bands run from the lowest to the highest.",
    )


def _curve_field(facts: ComparisonFacts, rows: Sequence[ArmRow]) -> tuple[str, str]:
    """Returns the field of `RunResult` whose curves are drawn, and its name for people."""
    names = {"held_out": f"held-out {facts.loss}", "scores": facts.score or "score"}
    for field, name in names.items():
        has_curve = any(len(getattr(run, field)) > 1 for row in rows for run in row.runs)
        if has_curve:
            return field, name
    return "losses", f"training {facts.loss}"


def _rates(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the quality over the learning rate, with a line for each adapter and for full.

    Where settings were stopped early, few are left at the end: their loss when all were compared.
    """
    if drawing.comparison.rungs:
        return _first_rung(drawing, figure)
    axes = figure.subplots()
    for rates in tables.rates(drawing.rows):
        measured_rows = [row for row in rates.tried if row.quality]
        if len(measured_rows) > 1:
            learning_rates = [row.arm.learning_rate for row in measured_rows]
            drawing.draw_line(axes, measured_rows, learning_rates)
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
    """Draws the values at the first early-stopping decision over the learning rate."""
    rung = drawing.comparison.rungs[0]
    values = {arm: value for arm, value in (*rung.kept, *rung.stopped) if math.isfinite(value)}
    axes = figure.subplots()
    for row in tables.series_and_stopped(drawing.rows):
        rate_group = row.arm.rate_group()
        arms = [arm for arm in values if arm.rate_group() == rate_group]
        arms.sort(key=lambda arm: arm.learning_rate)
        if arms:
            learning_rates = [arm.learning_rate for arm in arms]
            arm_values = [values[arm] for arm in arms]
            axes.plot(learning_rates, arm_values, label=drawing.name(row), **drawing.style(row))
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
    """Draws the quality over the number of trained parameters, with a line for each method."""
    rows = [row for row in drawing.series if row.quality and row.trained_parameters]
    if len(rows) < 2:
        return None
    rows.sort(key=_parameter_count)
    axes = figure.subplots()
    for group in tables.groups(rows, lambda arm: (arm.method, arm.targets)):
        name = words.family(group[0].arm, drawing.arms)
        drawing.draw_line(axes, group, [_parameter_count(row) for row in group], name)
    _scale_of_counts(axes, [_parameter_count(row) for row in rows])
    _label(figure, axes, "trained parameters", drawing.measure.name)
    return (
        f"{words.capital(drawing.measure.name)} by trained parameters",
        "Each adapter and full fine-tuning at its best learning rate; bars run from the lowest to "
        "the highest seed.",
    )


def _parameter_count(row: ArmRow) -> int:
    return row.trained_parameters or 0


def _dimension(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the score over the dimension of random subspaces, beside full fine-tuning's score."""
    dimensions = dimension.dimensions(drawing.comparison)
    if not dimensions:
        return None
    axes = figure.subplots()
    sizes: list[int] = []
    for measured in dimensions:
        method_sizes = [row.arm.dimension or 0 for row in measured.rows]
        sizes += method_sizes
        drawing.draw_line(axes, measured.rows, method_sizes, words.method(measured.method))
    _scale_of_counts(axes, sizes)
    axes.axhline(dimensions[0].whole, color=FULL, label=words.method("full"))
    target_label = f"{dimension.TARGET_SHARE:.0%} of it"
    axes.axhline(dimensions[0].target, color=FULL, linestyle="--", label=target_label)
    _label(figure, axes, "trained numbers d", drawing.measure.name)
    return (
        f"{words.capital(drawing.measure.name)} in random subspaces",
        "Each dimension at its best learning rate; marks are means over seeds, bars run from the "
        "lowest to the highest. Where a line crosses the dashes is d90, the intrinsic dimension.",
    )


def _costs(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws bars of time, memory and files, with one panel for each cost."""
    rows = _select_few_rows(drawing.series)
    panels: list[_CostPanel] = []
    for title, field, format_value in (
        ("step time", "step_seconds", words.seconds),
        ("step memory", "compiled_bytes", words.size),
        ("files of a task", "saved_bytes", words.size),
    ):
        values = [row.mean(field) or 0.0 for row in rows]
        n_measured = sum(value > 0 for value in values)
        if n_measured > 1:
            panels.append(_CostPanel(title=title, values=values, format_value=format_value))
    if not panels:
        return None
    figure.set_size_inches(WIDTH, len(panels) * (0.6 + 0.32 * len(rows)))
    panel_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, panel in zip(panel_axes, panels, strict=True):
        _draw_bars(drawing, axes, rows, panel)
    return (
        "Costs",
        "Each adapter and full fine-tuning at its best learning rate. Time and memory of a step "
        "are of one seed, run again alone. The size of files is a mean over seeds.",
    )


class _CostPanel(NamedTuple):
    """The panel of one cost: its title, the value of each row, and the number format."""

    title: str
    values: list[float]
    format_value: Callable[[float | None], str]


def _draw_bars(drawing: _Plot, axes: Axes, rows: Sequence[ArmRow], panel: _CostPanel) -> None:
    """Draws a horizontal bar for each row, with its value at the end."""
    y = range(len(rows))
    colours = [drawing.colour(row.arm.method) for row in rows]
    axes.barh(y, panel.values, color=colours, height=0.7)
    for bar_y, value in zip(y, panel.values, strict=True):
        text = f" {panel.format_value(value or None)}"
        axes.text(value, bar_y, text, va="center", fontsize=10.5)
    axes.set_yticks(y, [drawing.name(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(panel.values))
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.set_title(panel.title, loc="left", fontsize=11.5)


def _storage(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the bytes on disk over the number of tasks."""
    disk_uses = tables.storage(drawing.comparison)
    if not disk_uses:
        return None
    axes = figure.subplots()
    tasks = [disk_use.tasks for disk_use in disk_uses]
    model_bytes = [disk_use.full for disk_use in disk_uses]
    adapter_bytes = [disk_use.adapters for disk_use in disk_uses]
    axes.loglog(tasks, model_bytes, "s-", color=FULL, label="full models")
    best_adapter, _ = tables.best_sides(drawing.rows)
    assert best_adapter
    colour = drawing.colour(best_adapter.arm.method)
    axes.loglog(tasks, adapter_bytes, "o-", color=colour, label="one base and adapters")
    axes.set_xticks(tasks, [f"{n:,}" for n in tasks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.size(value)))
    _label(figure, axes, "tasks", "bytes on disk")
    return "Storage by number of tasks", "Both axes are logarithmic."


def _forgetting(drawing: _Plot, figure: Figure) -> tuple[str, str] | None:
    """Draws the rise of the loss outside the task."""
    rows = [row for row in drawing.series if row.spread_of("forgotten")]
    if not rows:
        return None
    figure.set_size_inches(WIDTH, 1.1 + 0.32 * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        spread = row.spread_of("forgotten")
        if spread:
            axes.errorbar(spread.mean, y, xerr=errors([spread]), **_mark(drawing.style(row)))
    axes.set_yticks(range(len(rows)), [drawing.name(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("rise of the loss\n(nats per token)")
    return (
        "Forgetting",
        "How much the loss on text outside the task rose in training; bars run from the lowest to "
        "the highest seed.",
    )


# Each draws the PNG that is called as it is: curves.png.
_DRAWERS = (_curves, _rates, _sizes, _dimension, _costs, _storage, _forgetting)


def errors(spreads: Sequence[Spread]) -> list[list[float]]:
    """Returns the lengths of error bars, from the lowest to the highest seed: [2, n]."""
    lower = [spread.mean - spread.low for spread in spreads]
    upper = [spread.high - spread.mean for spread in spreads]
    return [lower, upper]


def _select_few_rows(series: Sequence[ArmRow]) -> Sequence[ArmRow]:
    """Returns a few rows to draw, evenly chosen by size, and all rows of full fine-tuning."""
    full_rows = [row for row in series if row.is_full]
    other_rows = [row for row in series if not row.is_full]
    n_others = min(len(other_rows), _MOST_LINES - len(full_rows))
    indices = np.linspace(0, len(other_rows) - 1, n_others).round().astype(int)
    return [*(other_rows[index] for index in indices), *full_rows]


def _label(figure: Figure, axes: Axes, horizontal: str, vertical: str) -> None:
    """Sets the names of the axes, and adds a legend below them."""
    axes.set(xlabel=horizontal, ylabel=plain(vertical))
    figure.set_figheight(3.3 + add_legend(figure, [axes]))


def add_legend(figure: Figure, panels: Sequence[Axes]) -> float:
    """Adds one legend of all panels below them; returns its height in inches."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        panel_handles, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, panel_handles, strict=True))
    has_long_label = max(map(len, handles)) > 24
    n_columns = 1 if has_long_label else 2
    figure.legend(
        [*handles.values()], [*handles], loc="outside lower center", ncols=n_columns, fontsize=10.5
    )
    n_lines = sum(label.count("\n") + 1 for label in handles)
    return 0.2 * math.ceil(n_lines / n_columns)


def plain(text: str) -> str:
    """Returns text in which no dollar sign starts a formula."""
    return text.replace("$", r"\$")


def _seed_curves(curves: Iterable[Sequence[Point]]) -> tuple[list[int], Any, Any, Any]:
    """Returns the steps that all seeds measured, with the lowest, mean and highest values."""
    value_of_step: list[dict[int, float]] = []  # for each seed
    for curve in curves:
        if curve:
            finite = {point.step: point.value for point in curve if math.isfinite(point.value)}
            value_of_step.append(finite)
    if not value_of_step:
        return [], np.zeros(0), np.zeros(0), np.zeros(0)
    steps = sorted(set[int].intersection(*map(set, value_of_step)))
    values = np.zeros((len(value_of_step), len(steps)))  # [seeds, steps]
    for seed, seed_values in enumerate(value_of_step):
        values[seed] = [seed_values[step] for step in steps]
    return steps, values.min(axis=0), values.mean(axis=0), values.max(axis=0)


def _scale_of_counts(axes: Axes, counts: Sequence[float]) -> None:
    """Makes the horizontal axis logarithmic, with ticks such as 200, 10k and 5M."""
    axes.set_xscale("log")
    is_narrow = max(counts) < 30 * min(counts)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _mark(style: dict[str, Any]) -> dict[str, Any]:
    return {**style, "linestyle": "none", "capsize": 3, "markersize": 7}
