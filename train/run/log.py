"""The log of a run: a progress bar or plain lines, and its record on disk.

`metrics.jsonl` is the record of metrics, and `samples.jsonl` the record of sampled answers.
Reporters and the loss curve use both. A resumed run removes the lines after its checkpoint, so that
no step appears twice.
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
SAMPLED = "sample_"  # the prefix of the measure of sampled answers, like HELD_OUT and SCORE
_MAX_ANSWER_CHARS = 200  # characters of a sampled answer in the log
_SECONDS_BETWEEN_PROGRESS_LINES = 30.0  # in a log file
_SECONDS_BETWEEN_STEP_LINES = 1.0  # of a task with watched metrics
_N_CURVE_BLOCKS = 20  # a curve shows the mean of each block
_MAX_STEP_LINE_CHARS = 120  # of a task with watched metrics


class RunLog:
    """A context manager that logs one run, from step `first` (already done) to step `last`."""

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
          first, last: the number of the step before the first one, and of the last step.
          owed: prefixes of the measures that must be taken again after step `first`.
          reporting: receives all lines, first those of an earlier process; None for none.
          watched: the metrics in the line of a step, with explanations; empty for all metrics.
        """
        self._console = console
        self._last = last
        self._first_time_and_step: tuple[float, int] | None = None  # of the first printed line
        self._reporting = reporting
        self._watched = watched or {}
        self._print_time = float("-inf")  # of the newest line about a step
        metrics, samples = _truncate_record(folder, first, owed)
        if reporting is not None:
            _replay(reporting, metrics, samples)
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
        """Prints the metrics to watch, and starts the progress bar."""
        if self._watched:
            tell(self._console, f"metrics to watch (all metrics are in {METRICS}):")
        for name, explanation in self._watched.items():
            tell(self._console, f"  {name}: {explanation}")
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        self._file.close()

    def skipped(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records a skipped step, and prints the reason."""
        self._record(skipped_line(step, metrics))
        reason = metrics.get("lost")
        if not reason:
            reason = (
                f"its loss is {metrics['loss']}, its count {metrics['count']}, its gradient's norm "
                f"{metrics['grad_norm']}"
            )
        tell(self._console, f"step {step} skipped: {reason}")

    def add(self, line: Line) -> None:
        """Records and prints a line of metrics, which has a `step`."""
        line = self._record(line)
        step = line["step"]
        if "loss" in line:
            self._show_step(line)
        elif f"{HELD_OUT}loss" in line:
            held_out = {name.removeprefix(HELD_OUT): value for name, value in line.items()}
            tell(self._console, f"step {step}: held-out {losses_of(held_out)}")
        else:
            scores = []
            for name, value in line.items():
                if name.startswith(SCORE):
                    scores.append(f"{name.removeprefix(SCORE)} {value:.4g}")
            tell(self._console, f"step {step}: score {'  '.join(scores)}")

    def sampled(self, step: int, samples: Sequence[Sample], shown: int | None = None) -> None:
        """Records the model's answers after a step, and prints and reports the first ones.

        Args:
          step: the step.
          samples: the answers.
          shown: the number of answers to print and report; None for all.
        """
        now = round(time.time(), 3)
        with self._samples.open("a") as file:
            for sample in samples:
                fields = {
                    name: value for name, value in sample._asdict().items() if value is not None
                }
                line = {"step": step, **fields, "time": now}
                file.write(f"{json.dumps(line, ensure_ascii=False)}\n")
        shown_samples = samples[:shown]
        if not shown_samples:
            return
        if self._reporting is not None:
            self._reporting.samples(step, shown_samples, now)
        tell(self._console, f"step {step}: sampled answers")
        for sample in shown_samples:
            prompt = shorten(sample.prompt, _MAX_ANSWER_CHARS)
            answer = shorten(sample.answer, _MAX_ANSWER_CHARS)
            reward = "" if sample.reward is None else f"  [reward {sample.reward:.4g}]"
            tell(self._console, f"  > {prompt}\n    {answer}{reward}")

    def _record(self, line: Line) -> Line:
        """Adds the time to a line, writes and reports the line, and returns it."""
        line = {**line, "time": round(time.time(), 3)}
        self._file.write(f"{json.dumps(line)}\n")
        self._file.flush()  # so that a killed run has a record of its last step
        if self._reporting is not None:
            self._reporting.line(line)
        return line

    def _show_step(self, line: Line) -> None:
        """Prints the metrics of a step, or shows them in the progress bar."""
        metrics = self._format_metrics(line)
        step = line["step"]
        if self._progress:
            self._progress.update(self._task, completed=step, description=metrics)
            return
        now = time.monotonic()
        if self._first_time_and_step is None:
            self._first_time_and_step = (now, step)
        # Tasks with watched metrics have short steps, so not every step is printed.
        is_too_soon = now - self._print_time < _SECONDS_BETWEEN_STEP_LINES
        if self._watched and is_too_soon and step < self._last:
            return
        self._print_time = now
        text = f"step {step}/{self._last}  {metrics}"
        time_left = self._format_time_left(now, step)
        if not self._watched or len(text + time_left) <= _MAX_STEP_LINE_CHARS:
            text += time_left
        tell(self._console, text)

    def _format_metrics(self, line: Line) -> str:
        """Returns the watched metrics of a line, or its losses, learning rate and speed."""
        if self._watched:
            values = [f"{name} {line[name]:.3g}" for name in self._watched if name in line]
            return "  ".join(values)
        text = f"{losses_of(line)}  lr {line['lr']:.2e}"
        if "tokens_per_s" in line:
            text += f"  {line['tokens_per_s']:,.0f} tokens/s"
        return text

    def _format_time_left(self, now: float, step: int) -> str:
        """Returns the remaining time as text; "" in the first line, whose steps compile."""
        assert self._first_time_and_step is not None, "a line was printed"
        start_time, first_step = self._first_time_and_step
        if step == first_step < self._last:
            return ""
        seconds_per_step = (now - start_time) / max(step - first_step, 1)
        return f"  {duration(seconds_per_step * (self._last - step))} left"


class QuietLog(NullLog):
    """A log that writes nothing, for all processes except the first."""

    def sampled(self, step: int, samples: Sequence[Sample], shown: int | None = None) -> None:
        """Does nothing."""


def _truncate_record(folder: Path, step: int, owed: Sequence[str]) -> tuple[list[Line], list[Line]]:
    """Removes the metrics and the answers after a step from disk, and returns the others.

    Args:
      folder: the run's folder.
      step: the step.
      owed: prefixes of the measures that are taken again after this step.
    """
    metrics = []
    for line in read_metrics(folder):
        is_owed = any(name.startswith(tuple(owed)) for name in line)
        if line["step"] < step or (line["step"] == step and not is_owed):
            metrics.append(line)
    write_lines(folder / METRICS, metrics)
    samples = read_lines(folder / SAMPLES)
    if samples:
        last_step = step - 1 if SAMPLED in owed else step
        samples = [line for line in samples if line["step"] <= last_step]
        write_lines(folder / SAMPLES, samples)
    return metrics, samples


def _replay(reporting: Reporting, metrics: Sequence[Line], samples: Sequence[Line]) -> None:
    """Reports the record of an earlier process. Reporters skip lines that they already have."""
    lines = sorted([*metrics, *samples], key=lambda line: line["step"])
    for step, group in itertools.groupby(lines, key=lambda line: line["step"]):
        step_samples = []
        for line in group:
            if "answer" in line:
                step_samples.append(sample_of(line))
            else:
                reporting.line(line)
        if step_samples:
            reporting.samples(step, step_samples, line["time"])


def sample_of(line: Line) -> Sample:
    """Returns the sample of a line of samples.jsonl. Older lines have fewer facts."""
    return Sample(**{name: line[name] for name in Sample._fields if name in line})


@contextmanager
def doing(console: Console, operation: str) -> Iterator[Callable[[int, int], None]]:
    """Prints the name of a slow operation before it starts, and its seconds after it ends.

    Yields:
      A function (done, total) that shows the progress. A terminal shows it at once, and a log file
      gets a line every half a minute.
    """
    start_time = time.monotonic()
    print_time = start_time

    def progress(done: int, total: int) -> None:
        """Shows the number of finished items, at most every few seconds without a terminal."""
        nonlocal print_time
        if console.is_terminal:
            status.update(f"{operation}: {done} of {total}")
            return
        is_due = time.monotonic() - print_time >= _SECONDS_BETWEEN_PROGRESS_LINES
        if is_due and done < total:
            print_time = time.monotonic()
            tell(console, f"{operation}: {done} of {total}")

    if not console.is_terminal:
        tell(console, f"{operation} …")
    with console.status(operation) as status:
        yield progress
    tell(console, f"{operation}: {duration(time.monotonic() - start_time)}")


def read_metrics(folder: Path) -> list[Line]:
    """Reads the metrics of a run, without an incomplete last line."""
    return read_lines(folder / METRICS)


class Measurement(NamedTuple):
    """A value of a metric, and the step after which it was measured. Both may be None."""

    value: float | None
    step: int | None


def newest_measurement(lines: Sequence[Line], name: str, last_step: int) -> Measurement:
    """Returns the newest value of a metric up to a step.

    Args:
      lines: the run's metrics; see `read_metrics`.
      name: name of the metric.
      last_step: the step of the saved adapter; later values belong to other adapters.
    """
    for line in reversed(lines):
        if name in line and line["step"] <= last_step:
            return Measurement(line[name], line["step"])
    return Measurement(None, None)


def draw_curve(folder: Path, lines: Sequence[Line], label: str = "loss") -> None:
    """Draws the loss over the steps, as a PNG.

    A training loss is a mean over the steps of a line, and is drawn over these steps. A held-out
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
    """Draws each watched metric over the steps, as one PNG.

    Faint lines show the values, and strong lines show means over a twentieth of the values. Each
    value is drawn over the steps that it covers.

    Args:
      folder: the folder to write it to.
      lines: the run's metrics; see `read_metrics`.
      watched: the names of the metrics. The first one is the most important.

    Returns:
      A sentence about the first metric at the start and at the end; "" if nothing is drawn.
    """
    from matplotlib.figure import Figure  # only here: it takes half a second

    means_by_name = {}
    for name in watched:
        means = _window_means(lines, name)
        if means:
            means_by_name[name] = means
    if not means_by_name:
        return ""
    n_panels = len(means_by_name)
    figure = Figure(figsize=(7, 1.2 + 1.5 * n_panels), layout="tight")
    panels = figure.subplots(n_panels, sharex=True, squeeze=False)[:, 0]
    for axes, (name, means) in zip(panels, means_by_name.items(), strict=True):
        _plot_means(axes, means, alpha=0.3)
        _plot_means(axes, _block_means(means))
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    figure.savefig(folder / PROGRESS, dpi=120)
    first_name = next(iter(means_by_name))
    sentence = _describe_change(first_name, means_by_name[first_name])
    return f"{sentence}; drawn in {folder / PROGRESS}"


def _block_means(means: Sequence["_WindowMean"]) -> list["_WindowMean"]:
    """Returns the means over blocks of lines, each a twentieth of all lines."""
    block_size = _block_size(means)
    starts = range(0, len(means), block_size)
    return [_join_means(means[start : start + block_size]) for start in starts]


def _block_size(means: Sequence["_WindowMean"]) -> int:
    """Returns the number of lines in a block."""
    return max(1, len(means) // _N_CURVE_BLOCKS)


def _describe_change(name: str, means: Sequence["_WindowMean"]) -> str:
    """Returns a sentence with the means of a metric over the first and the last block of lines."""
    block_size = _block_size(means)
    start = _join_means(means[:block_size])
    end = _join_means(means[-block_size:])
    start_steps = "step" if start.n_steps == 1 else f"{start.n_steps} steps"
    end_steps = "last" if end.n_steps == start.n_steps else f"last {end.n_steps}"
    return (
        f"{name}: {start.value:.3g} in the first {start_steps}, {end.value:.3g} in the {end_steps}"
    )


class _WindowMean(NamedTuple):
    """The mean of a metric over the steps after `start_step`, up to `end_step`."""

    start_step: int
    end_step: int
    value: float

    @property
    def n_steps(self) -> int:
        """Returns the number of steps."""
        return self.end_step - self.start_step


def _window_means(lines: Sequence[Line], name: str) -> list[_WindowMean]:
    """Returns the values of a training metric, each with the steps that its line covers."""
    means = []
    start_step = 0
    for line in lines:
        if name in line:
            means.append(_WindowMean(start_step, line["step"], line[name]))
        if "loss" in line:
            start_step = line["step"]
    return means


def _join_means(means: Sequence[_WindowMean]) -> _WindowMean:
    """Returns the mean over all steps of several lines."""
    n_steps = sum(mean.n_steps for mean in means)
    value = sum(mean.value * mean.n_steps for mean in means) / n_steps
    return _WindowMean(means[0].start_step, means[-1].end_step, value)


def _plot_means(axes: Any, means: Sequence[_WindowMean], **style: Any) -> None:
    """Draws each mean as a horizontal line over the steps that it covers."""
    steps: list[int] = []
    values: list[float] = []
    for mean in means:
        steps += [mean.start_step, mean.end_step]
        values += [mean.value, mean.value]
    axes.plot(steps, values, color="C0", **style)
