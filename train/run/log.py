"""The log of a run: a progress bar or plain lines, and its metrics on disk.

`metrics.jsonl` is the record; TensorBoard's events and the loss curve are made from it. A resumed
run drops the lines after its checkpoint and writes the events again, so that no step appears
twice.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from lora_jax.training.log import Line, NullLog, duration, losses_of
from lora_jax.training.losses import HELD_OUT
from lora_jax.training.processes import is_first

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
CURVE = "loss.png"
_LINE_SECONDS = 30.0  # between lines of progress in a log file


class Log:
    """The log of one run, from step `first` (already done) to `last`; a context manager."""

    def __init__(self, folder: Path, console: Console, *, first: int, last: int) -> None:
        self._path = folder / METRICS
        self._console = console
        self._last = last
        self._began, self._first = time.monotonic(), first
        kept = [line for line in read_metrics(folder) if line["step"] <= first]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        partial.replace(self._path)
        shutil.rmtree(folder / EVENTS, ignore_errors=True)
        self._events = SummaryWriter(str(folder / EVENTS))
        for line in kept:
            self._add_events(line)
        self._file = self._path.open("a")
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

    def __enter__(self) -> "Log":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()
        self._file.close()
        self._events.close()

    def skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records that a step was skipped, and prints why."""
        self._record({"step": step, "skipped": 1.0})
        self._print(
            f"step {step} skipped: its loss is {metrics['loss']}, its count {metrics['count']}, "
            f"its gradient's norm {metrics['grad_norm']}"
        )

    def add(self, line: Line) -> None:
        """Records a line of metrics, which has a `step`, and prints it."""
        line = self._record(line)
        if "loss" in line:
            self._show(line)
        else:
            held_out = {k.removeprefix(HELD_OUT): v for k, v in line.items()}
            self._print(f"step {line['step']}: held-out {losses_of(held_out)}")

    def _record(self, line: Line) -> Line:
        line = {**line, "time": round(time.time(), 3)}
        self._file.write(f"{json.dumps(line)}\n")
        self._file.flush()  # so that a killed run has a record of its last step
        self._add_events(line)
        return line

    def _add_events(self, line: Line) -> None:
        for name, value in line.items():
            if name not in ("step", "time"):
                self._events.add_scalar(name, value, line["step"], walltime=line["time"])

    def _show(self, line: Line) -> None:
        text = f"{losses_of(line)}  lr {line['lr']:.2e}  {line['tokens_per_s']:,.0f} tokens/s"
        if self._progress:
            self._progress.update(self._task, completed=line["step"], description=text)
            return
        done = line["step"] - self._first
        left = (time.monotonic() - self._began) / max(done, 1) * (self._last - line["step"])
        self._print(f"step {line['step']}/{self._last}  {text}  {duration(left)} left")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def open_log(folder: Path, console: Console, *, first: int, last: int) -> Log | NullLog:
    """Returns the log of this process; only the first one writes. See `Log`."""
    return Log(folder, console, first=first, last=last) if is_first() else NullLog()


@contextmanager
def doing(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Says what a slow operation is before it begins, and how long it took in the end.

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
            console.print(f"{what}: {done} of {total}", highlight=False, soft_wrap=True)

    if not console.is_terminal:
        console.print(f"{what} …", highlight=False, soft_wrap=True)
    with console.status(what) as status:
        yield progress
    console.print(f"{what}: {duration(time.monotonic() - began)}", highlight=False)


def read_metrics(folder: Path) -> list[Line]:
    """Reads the metrics of a run; leaves out a last line that a kill cut short."""
    path = folder / METRICS
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def draw_curve(folder: Path, lines: Sequence[Line], label: str = "loss") -> None:
    """Draws the loss over the steps, as a PNG.

    Args:
      folder: the folder to write it to.
      lines: the run's metrics; see `read_metrics`.
      label: the label of the loss axis.
    """
    figure = Figure(figsize=(7, 4))  # without pyplot: no window, no global state
    axes = figure.subplots()
    for name, curve in (("loss", "training"), ("eval_loss", "held out")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=curve, marker="." * (name != "loss"))
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.tight_layout()
    figure.savefig(folder / CURVE, dpi=120)
