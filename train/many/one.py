"""One run of a table on its way: what it trains, and what came of it."""

import dataclasses
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lora_jax.bank.together.side_by_side import RunEnding
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import Stopped
from lora_jax.training.losses import HELD_OUT, SCORE, Loss
from lora_jax.training.processes import write_text
from lora_jax.training.ready import TrainingStart
from train.console.errors import flag
from train.console.output import tell
from train.inputs import Inputs
from train.many.board import BufferedConsole
from train.reporters.files import ERROR
from train.run.lifecycle import Run
from train.run.log import read_metrics
from train.run.output import ADAPTER
from train.run.task import Evaluation, Task
from train.settings.table import TableRow


class RunRequest(NamedTuple):
    """A run of the table, with its task and the task's defaults."""

    row: TableRow[Any]
    task: Task


@dataclasses.dataclass(eq=False)
class TableRun:
    """A run of the table on its way.

    Attributes:
      row: its row, and its options.
      task: what it trains on.
      paper: its console.
      run, inputs: as in a run alone.
      loss: the function to minimise.
      evaluation: before and after training; None for none.
      ready: what it trains from, its state as shapes.
      ending: what came of it.
      score: the task's score in the end.
    """

    row: TableRow[Any]
    task: Task
    paper: BufferedConsole
    run: Run
    inputs: Inputs
    loss: Loss
    evaluation: Evaluation | None = None
    ready: TrainingStart | None = None
    ending: RunEnding = RunEnding()
    score: float | None = None

    @property
    def config(self) -> Any:
        """Its options, with the task's defaults."""
        return self.run.config

    @property
    def state(self) -> str:
        """Says how it ended."""
        error = self.ending.error
        if isinstance(error, Stopped):
            return "stopped"
        if error is not None:
            return "failed"
        if self.run.pauses:
            return "paused"
        return "ended early" if self.ending.result[1].get("ended_early") else "done"

    @property
    def why(self) -> str | None:
        """The first line of what ended it before its time."""
        error = self.ending.error
        if error is None or isinstance(error, Stopped):
            return None
        said = error.said(flag) if isinstance(error, TrainingError) else f"{error!r}"
        return said.strip().splitlines()[0]

    @contextmanager
    def isolate_errors(self) -> Iterator[None]:
        """Within, an error is the run's own: it is kept in its folder, and the others go on."""
        try:
            yield
        except Exception as error:
            self.ending = RunEnding(error=error)
            self.record()

    def record(self) -> None:
        """Writes to its folder why it failed."""
        error = self.ending.error
        whole = "".join(traceback.format_exception(error))
        if isinstance(error, TrainingError):
            whole = error.said(flag)
        tell(self.run.console, f"error: {whole}")
        write_text(self.run.folder / ERROR, f"{whole.rstrip()}\n")

    def result(self) -> dict[str, Any]:
        """Returns what came of it, as a row of the table of results."""
        lines = read_metrics(self.run.folder)
        named = f"{SCORE}{self.task.score}"

        def newest(name: str) -> float | None:
            return next((line[name] for line in reversed(lines) if name in line), None)

        held_out, score = newest(f"{HELD_OUT}loss"), newest(named)
        if self.ready is not None and self.ready.best is not None:
            best = self.ready.best.about
            held_out, score = best.get(f"{HELD_OUT}loss", held_out), best.get(named, score)
        adapter = self.run.folder / ADAPTER
        return {
            "name": self.row.name,
            "status": self.state,
            "steps": lines[-1]["step"] if lines else 0,
            "loss": newest("loss"),
            "held_out_loss": held_out,
            "score": score if self.score is None else self.score,
            "adapter": str(adapter) if self.ending.result is not None else None,
            "error": self.why,
        }
