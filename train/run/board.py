"""Shows the progress of all runs of a table, and writes a log to the folder of each run."""

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

_SECONDS_BETWEEN_TABLES = 5.0  # in a log file
_LOG_WIDTH_CHARS = 100


class Board:
    """Shows a table of all runs: live in a terminal, and every few seconds in a log file."""

    def __init__(self, console: Console, steps: Mapping[str, int]) -> None:
        """Creates a board of runs that have taken no step.

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
        """Adds a line of a run's metrics."""
        self._lines[name] = {**self._lines.get(name, {}), **line}
        self._has_news = True

    def ended(self, name: str, state: str) -> None:
        """Records the end of a run and the state in which it ended."""
        self._endings[name] = state
        self._has_news = True
        if self._live is None:
            tell(self._console, f"{name}: {state}")

    def show(self) -> None:
        """Shows the table if something is new and the last table is old enough."""
        now = time.monotonic()
        is_too_soon = self._live is None and now - self._shown_time < _SECONDS_BETWEEN_TABLES
        if is_too_soon or not self._has_news:
            return
        self._shown_time = now
        self._has_news = False
        if self._live:
            self._live.update(self._make_table(), refresh=True)
        else:
            self._console.print(self._make_table())

    def _make_table(self) -> Table:
        """Returns a table with the newest metrics of each run, and the state of ended runs."""
        titles = ("step", "loss", "held-out", "tokens/s")
        columns = [Column(title, justify="right") for title in titles]
        table = Table("run", *columns, "", box=None, pad_edge=False)
        for name, n_steps in self._steps.items():
            metrics = self._lines.get(name, {})
            table.add_row(
                _format_cell(name),
                f"{metrics.get('step', 0)}/{n_steps}",
                _format_metric(metrics.get("loss"), ".4f"),
                _format_metric(metrics.get("eval_loss"), ".4f"),
                _format_metric(metrics.get("tokens_per_s"), ",.0f"),
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
        """Adds a line of metrics to both."""
        self._log.add(line)
        self._board.note(self._name, line)

    def skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a skipped step to both."""
        self._log.skipped(step, metrics)
        self._board.note(self._name, {"step": step, "loss": metrics["loss"]})


class BufferedConsole:
    """The console of one run, whose output goes to log.txt in the run's folder.

    The output is kept in memory until the run may write to the folder.

    Attributes:
      console: the console.
    """

    def __init__(self) -> None:
        self._buffer = io.StringIO()
        self.console = Console(
            file=self._buffer, width=_LOG_WIDTH_CHARS, force_terminal=False, no_color=True
        )

    def keep_in(self, folder: Path, stack: ExitStack) -> None:
        """Writes the earlier and all later lines to the folder's log.

        Args:
          folder: the run's folder.
          stack: closes the file at the end.
        """
        file = stack.enter_context((folder / LOG).open("a", encoding="utf-8", buffering=1))
        file.write(self._buffer.getvalue())
        self.console.file = file


def print_results(
    console: Console, rows: Sequence[Mapping[str, Any]], hidden: Sequence[str] = ()
) -> None:
    """Prints the results of all runs, one row per run.

    Long names are wrapped, but numbers are not. A column without any value is not printed.

    Args:
      console: console to print to.
      rows: the results of each run, by name. The first result is the name of the run.
      hidden: the names of results that are not printed.
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
        table.add_row(*(_format_cell(row[name]) for name in shown_names))
    console.print(table)


def _format_cell(value: Any) -> str:
    """Returns the text of a table's cell; "" for None."""
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("[", r"\[")  # rich reads brackets as markup


def _format_metric(value: float | None, format_spec: str) -> str:
    """Returns the text of a metric; "" for None."""
    return "" if value is None else format(value, format_spec)
