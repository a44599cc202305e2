"""Shows progress as a bar in a terminal, and as occasional lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.training.run.log import duration

_SECONDS_A_LINE = 10.0  # between lines, where there is no terminal to draw a bar


@contextmanager
def progress_of(
    n_total: int,
    doing: str,
    done: str,
    things: str,
    *,
    hidden: bool = False,
    console: Console | None = None,
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of some work; yields a function that takes the number of finished items.

    Args:
      n_total: the number of things to do.
      doing: the work, in front of the bar: "classifying".
      done: the work, in a line: "classified".
      things: what the number counts: "texts".
      hidden: draws no bar, such as over an output to the same terminal.
      console: the console to show it on; by default stderr.
    """
    console = console or Console(stderr=True)
    bar = Progress(
        TextColumn(doing),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
    )
    task = bar.add_task("", total=n_total)
    start_time = last_line_time = time.monotonic()

    def progress(n_done: int) -> None:
        """Updates the bar, and prints a line from time to time without a terminal."""
        nonlocal last_line_time
        bar.update(task, completed=n_done)
        now = time.monotonic()
        if n_done and not console.is_terminal and now - last_line_time > _SECONDS_A_LINE:
            last_line_time = now
            time_left = duration((now - start_time) * (n_total - n_done) / n_done)
            line = f"{done} {n_done:,} of {n_total:,} {things}, {time_left} to go"
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    with bar:
        yield progress
