"""The log of a run: a progress bar or plain lines, and its record on disk.

`metrics.jsonl` is the record, and `samples.jsonl` that of sampled answers; reporters and the loss
curve are fed from them. A resumed run drops the lines after its checkpoint, so that no
step appears twice.
"""

import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.training.losses import HELD_OUT, SCORE
from lora_jax.training.run.log import Line, NullLog, duration, losses_of, skipped_line
from train.console.output import shorten, tell
from train.reporters.contract import Sample
from train.reporters.files import METRICS, SAMPLES, read_lines, write_lines
from train.reporters.reporting import Reporting

CURVE = "loss.png"
PROGRESS = "progress.png"
SAMPLED = "sample_"  # the measure of sampled answers, beside HELD_OUT and SCORE
_LONGEST = 200  # characters of a sampled answer in the log
_LINE_SECONDS = 30.0  # between lines of progress in a log file
_STEP_SECONDS = 1.0  # between the lines of steps, where a task says what to watch
_PARTS = 20  # of a curve, over each of which a mean is taken
_COLUMNS = 120  # characters of such a line


class RunLog:
    """The log of one run, from step `first` (already done) to `last`; a context manager."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        first: int,
        last: int,
        owed: Sequence[str] = (),
        reporting: Reporting | None = None,
        watched: Mapping[str, str] | None = None,
    ) -> None:
        """Opens the log.

        Args:
          folder: the run's folder.
          console: console to print to.
          first, last: the steps.
          owed: prefixes of the measures that have to be taken again after step `first`.
          reporting: gets all lines, those of an earlier process first; None for none.
          watched: the metrics that the line of a step shows, each explained; none for all.
        """
        self._console = console
        self._last = last
        self._first_line: tuple[float, int] | None = None  # its time and step
        self._reporting = reporting
        self._watched, self._shown = watched or {}, float("-inf")

        def is_kept(line: Line) -> bool:
            again = any(name.startswith(tuple(owed)) for name in line)
            return line["step"] < first or (line["step"] == first and not again)

        kept = [line for line in read_metrics(folder) if is_kept(line)]
        write_lines(folder / METRICS, kept)
        answered = read_lines(folder / SAMPLES)
        if answered:
            last_kept = first - (SAMPLED in owed)
            answered = [line for line in answered if line["step"] <= last_kept]
            write_lines(folder / SAMPLES, answered)
        if reporting is not None:
            _replay(reporting, kept, answered)
        self._file = (folder / METRICS).open("a")
        self._samples = folder / SAMPLES
        self._progress = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("compiling", total=last, completed=first)

    def __enter__(self) -> "RunLog":
        if self._watched:
            tell(self._console, f"what to watch (all metrics are in {METRICS}):")
        for name, why in self._watched.items():
            tell(self._console, f"  {name}: {why}")
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        self._file.close()

    def skipped(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records that a step was skipped, and prints why."""
        self._record(skipped_line(step, metrics))
        why = metrics.get("lost") or (
            f"its loss is {metrics['loss']}, its count {metrics['count']}, its gradient's norm "
            f"{metrics['grad_norm']}"
        )
        tell(self._console, f"step {step} skipped: {why}")

    def add(self, line: Line) -> None:
        """Records a line of metrics, which has a `step`, and prints it."""
        line = self._record(line)
        if "loss" in line:
            self._show(line)
        elif f"{HELD_OUT}loss" in line:
            held_out = {k.removeprefix(HELD_OUT): v for k, v in line.items()}
            tell(self._console, f"step {line['step']}: held-out {losses_of(held_out)}")
        else:
            scored = {k: v for k, v in line.items() if k.startswith(SCORE)}
            scores = (f"{k.removeprefix(SCORE)} {v:.4g}" for k, v in scored.items())
            tell(self._console, f"step {line['step']}: score {'  '.join(scores)}")

    def sampled(self, step: int, samples: Sequence[Sample], shown: int | None = None) -> None:
        """Records the model's answers after a step; prints and reports the first ones.

        Args:
          step: the step.
          samples: the answers.
          shown: how many are printed and reported; None for all.
        """
        at = round(time.time(), 3)
        with self._samples.open("a") as file:
            for sample in samples:
                known = {k: v for k, v in sample._asdict().items() if v is not None}
                line = {"step": step, **known, "time": at}
                file.write(f"{json.dumps(line, ensure_ascii=False)}\n")
        first = samples[:shown]
        if self._reporting is not None and first:
            self._reporting.samples(step, first, at)
        if first:
            tell(self._console, f"step {step}: sampled answers")
        for sample in first:
            reward = "" if sample.reward is None else f"  [reward {sample.reward:.4g}]"
            prompt, answer = shorten(sample.prompt, _LONGEST), shorten(sample.answer, _LONGEST)
            tell(self._console, f"  > {prompt}\n    {answer}{reward}")

    def _record(self, line: Line) -> Line:
        line = {**line, "time": round(time.time(), 3)}
        self._file.write(f"{json.dumps(line)}\n")
        self._file.flush()  # so that a killed run has a record of its last step
        if self._reporting is not None:
            self._reporting.line(line)
        return line

    def _show(self, line: Line) -> None:
        text = f"{losses_of(line)}  lr {line['lr']:.2e}"
        if "tokens_per_s" in line:
            text += f"  {line['tokens_per_s']:,.0f} tokens/s"
        if self._watched:
            shown = (f"{name} {line[name]:.3g}" for name in self._watched if name in line)
            text = "  ".join(shown)
        if self._progress:
            self._progress.update(self._task, completed=line["step"], description=text)
            return
        now, step = time.monotonic(), line["step"]
        if self._first_line is None:
            self._first_line = now, step
        if self._watched and now - self._shown < _STEP_SECONDS and step < self._last:
            return
        self._shown = now
        text = f"step {step}/{self._last}  {text}"
        left = self._time_left(now, step)
        if not self._watched or len(text + left) <= _COLUMNS:
            text += left
        tell(self._console, text)

    def _time_left(self, now: float, step: int) -> str:
        """Returns the time that is left; "" in the first line, whose steps compile."""
        began, first_step = self._first_line or (now, step)
        if step == first_step < self._last:
            return ""
        pace = (now - began) / max(step - first_step, 1)
        return f"  {duration(pace * (self._last - step))} left"


class QuietLog(NullLog):
    """Logs nothing; the log of all processes but the first."""

    def sampled(self, step: int, samples: Sequence[Sample], shown: int | None = None) -> None:
        """Keeps nothing."""


def _replay(reporting: Reporting, lines: Sequence[Line], answered: Sequence[Line]) -> None:
    """Reports the record of an earlier process; reporters skip what they already have."""
    both = sorted([*lines, *answered], key=lambda line: line["step"])
    for step, group in itertools.groupby(both, key=lambda line: line["step"]):
        of_step = [*group]
        for line in of_step:
            if "answer" not in line:
                reporting.line(line)
        samples = [
            Sample(line["prompt"], line["answer"], line.get("reward"))
            for line in of_step
            if "answer" in line
        ]
        if samples:
            reporting.samples(step, samples, of_step[-1]["time"])


@contextmanager
def doing(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Names a slow operation before it begins, and its seconds after it ends.

    Yields:
      A function (done, of how many) that shows the progress: in a terminal at once, in a log file
      as a line every half a minute.
    """
    began = shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if console.is_terminal:
            status.update(f"{what}: {done} of {total}")
        elif time.monotonic() - shown >= _LINE_SECONDS and done < total:
            shown = time.monotonic()
            tell(console, f"{what}: {done} of {total}")

    if not console.is_terminal:
        tell(console, f"{what} …")
    with console.status(what) as status:
        yield progress
    tell(console, f"{what}: {duration(time.monotonic() - began)}")


def read_metrics(folder: Path) -> list[Line]:
    """Reads the metrics of a run; leaves out a last line that a kill cut short."""
    return read_lines(folder / METRICS)


class Measurement(NamedTuple):
    """A value of a run's metrics, and the step after which it was measured; None without one."""

    value: float | None
    step: int | None


def newest_measurement(lines: Sequence[Line], name: str, last_step: int) -> Measurement:
    """Returns the newest value of a metric up to a step.

    Args:
      lines: the run's metrics; see `read_metrics`.
      name: name of the metric.
      last_step: the step; values of later steps belong to another adapter than that of this step.
    """
    for line in reversed(lines):
        if name in line and line["step"] <= last_step:
            return Measurement(line[name], line["step"])
    return Measurement(None, None)


def draw_curve(folder: Path, lines: Sequence[Line], label: str = "loss") -> None:
    """Draws the loss over the steps, as a PNG.

    A loss in training is a mean over the steps of a line, and is drawn over these steps. A held-out
    loss is a point at its step.

    Args:
      folder: the folder to write it to.
      lines: the run's metrics; see `read_metrics`.
      label: the label of the loss axis.
    """
    from matplotlib.figure import Figure  # only here: it takes half a second

    figure = Figure(figsize=(7, 4), layout="tight")  # without pyplot: no window, no global state
    axes = figure.subplots()
    means = _window_means(lines, "loss")
    if means:
        _plot_means(axes, means, label="training")
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), label="held out", marker=".", color="C1")
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(folder / CURVE, dpi=120)


def draw_progress(folder: Path, lines: Sequence[Line], watched: Collection[str]) -> str:
    """Draws each metric that a task says to watch over the steps, as one PNG.

    The faint values are those of the lines, the strong ones means over a twentieth of the lines.
    Each is drawn over the steps that it covers.

    Args:
      folder: the folder to write it to.
      lines: the run's metrics; see `read_metrics`.
      watched: the names of the metrics, the most telling one first.

    Returns:
      A sentence on that metric, at the beginning and the end; "" where nothing is drawn.
    """
    from matplotlib.figure import Figure  # only here: it takes half a second

    curves = {name: _window_means(lines, name) for name in watched}
    curves = {name: means for name, means in curves.items() if means}
    if not curves:
        return ""
    figure = Figure(figsize=(7, 1.2 + 1.5 * len(curves)), layout="tight")
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (name, means) in zip(panels, curves.items(), strict=True):
        n_lines = max(1, len(means) // _PARTS)
        blocks = [_joined(means[i : i + n_lines]) for i in range(0, len(means), n_lines)]
        _plot_means(axes, means, alpha=0.3)
        _plot_means(axes, blocks)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    figure.savefig(folder / PROGRESS, dpi=120)
    name, means = next(iter(curves.items()))
    n_lines = max(1, len(means) // _PARTS)
    start, end = _joined(means[:n_lines]), _joined(means[-n_lines:])
    n_steps = start.n_steps
    steps = "step" if n_steps == 1 else f"{n_steps} steps"
    last = "last" if end.n_steps == n_steps else f"last {end.n_steps}"
    return (
        f"{name}: {start.value:.3g} in the first {steps}, {end.value:.3g} in the {last}; drawn in "
        f"{folder / PROGRESS}"
    )


class _WindowMean(NamedTuple):
    """The mean of a metric over the steps after `begun`, up to `done`."""

    begun: int
    done: int
    value: float

    @property
    def n_steps(self) -> int:
        """Returns the number of steps."""
        return self.done - self.begun


def _window_means(lines: Sequence[Line], name: str) -> list[_WindowMean]:
    """Returns the means of a metric of training, each with the steps that its line covers."""
    means, begun = [], 0
    for line in lines:
        if name in line:
            means.append(_WindowMean(begun, line["step"], line[name]))
        if "loss" in line:
            begun = line["step"]
    return means


def _joined(means: Sequence[_WindowMean]) -> _WindowMean:
    """Returns the mean of several lines, over all their steps."""
    n_steps = sum(mean.n_steps for mean in means)
    value = sum(mean.value * mean.n_steps for mean in means) / n_steps
    return _WindowMean(means[0].begun, means[-1].done, value)


def _plot_means(axes: Any, means: Sequence[_WindowMean], **style: Any) -> None:
    """Draws means as a staircase, each over the steps that it covers."""
    steps = [step for mean in means for step in (mean.begun, mean.done)]
    values = [value for mean in means for value in (mean.value, mean.value)]
    axes.plot(steps, values, color="C0", **style)
