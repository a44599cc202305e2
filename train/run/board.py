"""The progress of all runs of a table in the console, and the log in the folder of each."""

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from lora_jax.training.run.log import Line
from train.console.output import tell
from train.reporters.files import LOG
from train.run.log import QuietLog, RunLog

_TABLE_SECONDS = 5.0  # between tables in a log file
_LOG_CHARS = 100  # characters of a run's own log


class Board:
    """Shows a table of all runs: in a terminal always the newest, in a log file now and then."""

    def __init__(self, console: Console, steps: Mapping[str, int]) -> None:
        """Begins with runs that have taken no step.

        Args:
          console: console to print to.
          steps: the number of the last step of each run, by name.
        """
        self._console = console
        self._steps = steps
        self._lines: dict[str, Line] = {}
        self._endings: dict[str, str] = {}
        self._shown_time = float("-inf")
        self._has_news = False
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, name: str, line: Line) -> None:
        """Takes a line of a run's metrics."""
        self._lines[name] = {**self._lines.get(name, {}), **line}
        self._has_news = True

    def ended(self, name: str, how: str) -> None:
        """The end of a run."""
        self._endings[name] = how
        self._has_news = True
        if self._live is None:
            tell(self._console, f"{name}: {how}")

    def show(self) -> None:
        """Shows the runs, if anything is new and the last table is old enough."""
        now = time.monotonic()
        is_too_soon = self._live is None and now - self._shown_time < _TABLE_SECONDS
        if is_too_soon or not self._has_news:
            return
        self._shown_time = now
        self._has_news = False
        if self._live:
            self._live.update(self._table(), refresh=True)
        else:
            self._console.print(self._table())

    def _table(self) -> Table:
        """Returns a table with a row for each run: its newest figures, and how it ended."""
        titles = ("step", "loss", "held-out", "tokens/s")
        columns = [Column(title, justify="right") for title in titles]
        table = Table("run", *columns, "", box=None, pad_edge=False)
        for name, n_steps in self._steps.items():
            metrics = self._lines.get(name, {})
            table.add_row(
                _cell(name),
                f"{metrics.get('step', 0)}/{n_steps}",
                _figure(metrics.get("loss"), ".4f"),
                _figure(metrics.get("eval_loss"), ".4f"),
                _figure(metrics.get("tokens_per_s"), ",.0f"),
                self._endings.get(name, ""),
            )
        return table


class TeeLog:
    """Writes to the log of a run and to the board."""

    def __init__(self, log: RunLog | QuietLog, board: Board, name: str) -> None:
        self._log = log
        self._board = board
        self._name = name

    def __enter__(self) -> "TeeLog":
        self._log.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._log.__exit__(*error)

    def add(self, line: Line) -> None:
        """Takes a line of metrics."""
        self._log.add(line)
        self._board.note(self._name, line)

    def skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step that was skipped."""
        self._log.skipped(step, metrics)
        self._board.note(self._name, {"step": step, "loss": metrics["loss"]})


class BufferedConsole:
    """The console of one run: what it prints goes to log.txt in its folder.

    Until the folder is this run's, it is kept in memory.

    Attributes:
      console: the console.
    """

    def __init__(self) -> None:
        self._buffer = io.StringIO()
        self.console = Console(
            file=self._buffer, width=_LOG_CHARS, force_terminal=False, no_color=True
        )

    def keep_in(self, folder: Path, stack: ExitStack) -> None:
        """Writes the lines printed so far, and those to come, to the folder's log.

        Args:
          folder: the run's.
          stack: closes the file in the end.
        """
        file = stack.enter_context((folder / LOG).open("a", encoding="utf-8", buffering=1))
        file.write(self._buffer.getvalue())
        self.console.file = file


def print_results(
    console: Console, rows: Sequence[Mapping[str, Any]], hidden: Sequence[str] = ()
) -> None:
    """Prints the results of all runs, a row each.

    Long names are folded, and figures never are. A column in which no run has a value is left out.

    Args:
      console: console to print to.
      rows: the results of each run, by name: first its own name, which is a text.
      hidden: the results that are not printed.
    """
    run_column, *result_names = rows[0]
    table = Table(title="Runs", box=None, pad_edge=False)
    table.add_column(run_column, overflow="fold")
    shown_names = [run_column]
    for name in result_names:
        has_values = any(row.get(name) is not None for row in rows)
        if has_values and name not in hidden:
            table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
            shown_names.append(name)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in shown_names))
    console.print(table)


def _cell(value: Any) -> str:
    """Returns a value as the text of a table's cell; "" for None."""
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("[", r"\[")


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
