"""A run of a table on its way, and its row of results; a single run is a table of one row."""

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from lora_jax.core.types import Forward, Tree
from lora_jax.subspace import Subspace
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import Hooks, Stopped
from lora_jax.training.losses import HELD_OUT, SCORE, Loss
from lora_jax.training.processes import write_text
from lora_jax.training.ready import TrainingStart
from lora_jax.training.run.best import Best
from train.console.errors import flag
from train.console.output import tell
from train.inputs import InputReader, Inputs
from train.options.common import Options
from train.reporters.files import ERROR
from train.run.board import BufferedConsole
from train.run.lifecycle import Run
from train.run.log import newest_measurement, read_metrics
from train.run.output import ADAPTER
from train.run.task import Evaluation, Task
from train.settings.table import TableRow


class RunRequest(NamedTuple):
    """A run to train, with its task and the task's defaults."""

    row: TableRow[Any]
    task: Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPart:
    """The steps that runs train now, and the parts that they share with others over the same base.

    Attributes:
      until: returns the step to pause after, from the number of all steps and the run's options. A
        run that pauses is saved, not evaluated; --resume goes on with it. None trains to the end.
      on_trained: gets each run that came to its end, the adapted tree, and the function that runs
        it.
      hint: tells an interrupted user how to go on; None for this command line with --resume.
      measured: the evaluations of the base so far. What one of them measured is not measured again;
        new ones are added.
      reader: reads rows once for all runs of the same data.
      is_prior: whether another run begins with the trained model, and prints the ending for both.
    """

    until: Callable[[int, Options], int] | None = None
    on_trained: Callable[[Run, Tree, Forward], object] | None = None
    hint: str | None = None
    measured: list[Evaluation] = dataclasses.field(default_factory=list)
    reader: InputReader = dataclasses.field(default_factory=InputReader)
    is_prior: bool = False

    def evaluate_base(
        self, evaluation: Evaluation, model: Any, plain: Tree, forward: Forward
    ) -> None:
        """Measures the base, unless an earlier evaluation has; notes the one that measures."""
        if not any(map(evaluation.reuse_base_scores, self.measured)):
            evaluation.before(model, plain, forward)
            self.measured.append(evaluation)


@dataclasses.dataclass(eq=False, kw_only=True)
class TableRun:
    """A run on its way.

    Attributes:
      name: its name in the table.
      task: what it trains on.
      run, inputs: its options, folder and data.
      loss: the function to minimise.
      space: the subspace that it trains in; None for the adapter's own.
      buffer: its console beside other runs; None for a single run, whose errors end the command.
      evaluation: before and after training; None for none.
      is_finished: whether it was over when it was resumed, so that nothing of it changes.
      start: what it trains from, its state as shapes once it trains.
      best: keeps its best adapter; None for none.
      hooks: connect the loop with it.
      trained: the adapted tree that came of it.
      report: what came of its training; None where it did not end.
      error: what ended it before its time.
      scores: the task's scores in the end.
    """

    name: str
    task: Task
    run: Run
    inputs: Inputs
    loss: Loss
    space: Subspace | None = None
    buffer: BufferedConsole | None = None
    evaluation: Evaluation | None = None
    is_finished: bool = False
    start: TrainingStart | None = None
    best: Best | None = None
    hooks: Hooks | None = None
    trained: Tree = None
    report: dict[str, Any] | None = None
    error: BaseException | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def is_alone(self) -> bool:
        """True for a single run."""
        return self.buffer is None

    @property
    def score(self) -> float | None:
        """The task's score in the end; None where it is not known."""
        return self.scores.get(self.task.score or "")

    @property
    def state(self) -> str:
        """The way in which it ended, in a word or two."""
        if isinstance(self.error, Stopped):
            return "stopped"
        if self.error is not None:
            return "failed"
        if self.run.pauses:
            return "paused"
        return "ended early" if (self.report or {}).get("ended_early") else "done"

    @property
    def why(self) -> str | None:
        """The first line of the error that ended it before its time."""
        error = self.error
        if error is None or isinstance(error, Stopped):
            return None
        message = error.said(flag) if isinstance(error, TrainingError) else f"{error!r}"
        return message.strip().splitlines()[0]

    def drop_state(self) -> TrainingStart:
        """Puts shapes in the place of its first state's arrays; returns the start with arrays."""
        assert (start := self.start) is not None
        self.start = dataclasses.replace(start, state=jax.eval_shape(lambda: start.state))
        return start

    def take_trained(self) -> Tree:
        """Returns the adapted tree that came of it, which the run then no longer holds."""
        tree, self.trained, self.start, self.hooks = self.trained, None, None, None
        return tree

    @contextmanager
    def isolate_errors(self) -> Iterator[None]:
        """Within this context, an error ends this run alone, and is kept in its folder."""
        try:
            yield
        except Exception as error:
            if self.is_alone:
                raise
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Keeps the error that ended it, and writes it to its folder unless a signal stopped it."""
        self.error, self.trained, self.report = error, None, None
        if isinstance(error, Stopped):
            return
        whole = "".join(traceback.format_exception(error))
        if isinstance(error, TrainingError):
            whole = error.said(flag)
        tell(self.run.console, f"error: {whole}")
        write_text(self.run.folder / ERROR, f"{whole.rstrip()}\n")

    def result(self) -> dict[str, Any]:
        """Returns its row of the table of results."""
        lines, report = read_metrics(self.run.folder), self.report or {}
        last = report.get("last_step", lines[-1]["step"] if lines else 0)
        best = report.get("best", {}) if self.best is None else self.best.about
        kept: Any = best.get("step", last)
        loss, held_out, score = (
            newest_measurement(lines, name, kept)
            for name in ("loss", f"{HELD_OUT}loss", f"{SCORE}{self.task.score}")
        )
        return {
            "name": self.name,
            "status": self.state,
            "steps": last,
            "kept_step": kept,
            "loss": loss.value,
            "loss_step": loss.step,
            "held_out_loss": held_out.value,
            "held_out_step": held_out.step,
            "score": score.value if self.score is None else self.score,
            "adapter": None if self.report is None else str(self.run.folder / ADAPTER),
            "error": self.why,
        }
