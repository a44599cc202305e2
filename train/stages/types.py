"""The stages of a run's life as types, in their order, and the endings of a run.

Each type is made from the one before it by one function, which the type names. A run of a table and
a single run have the same stages. What is large is handed over: once a stage has taken it, the
stage before holds it no more.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from rich.console import Console

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.subspace import Subspace
from lora_jax.training.clock import StepClock, StepTimes
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import Layout
from lora_jax.training.loop import Stopped
from lora_jax.training.losses import Loss
from lora_jax.training.ready import TrainingStart
from lora_jax.training.run.best import Best
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State
from train.console.errors import flag
from train.options.common import Options
from train.run.output import OutputFolder
from train.run.pretrained import ModelInfo
from train.run.task import Evaluation, Task
from train.stages.inputs import InputReader, Inputs

Content = TypeVar("Content")


class Handover(Generic[Content]):
    """Holds something large until the next stage takes it."""

    def __init__(self, content: Content) -> None:
        self._contents = [content]

    @property
    def content(self) -> Content:
        """The content, for a look at it."""
        (content,) = self._contents
        return content

    def take(self) -> Content:
        """Returns the content, which is then held here no more."""
        return self._contents.pop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """The end of training for now, and the things that runs over the same base share.

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
    on_trained: Callable[["OpenedRun", Tree, Forward], object] | None = None
    hint: str | None = None
    measured: list[Evaluation] = dataclasses.field(default_factory=list)
    reader: InputReader = dataclasses.field(default_factory=InputReader)
    is_prior: bool = False


class SharedModel(NamedTuple):
    """The model that runs share.

    Attributes:
      model: the model.
      outline: the model without its weights.
      layout: the placement of weights and activations on the mesh.
      n_bytes: bytes of its weights in memory.
      adapted_forward: the model's ``apply`` on an adapted tree, not laid out for a step.
    """

    model: Model
    outline: ModelInfo
    layout: Layout
    n_bytes: int
    adapted_forward: Forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedRun:
    """A run that is asked for: by a command line, by a line of a table, or by another command.

    Attributes:
      name: its name among the runs of a table; "" for a single run.
      where: the place where it is asked for, in messages: "--many runs.csv, line 3"; "" for none.
      options: its options, checked, with the task's defaults.
      task: the task that it trains on.
    """

    name: str = ""
    where: str = ""
    options: Any
    task: Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run whose options are checked, whose folder is locked and whose rows are read.

    `train.stages.open.open_run` makes it.

    Attributes:
      asked: the run as it was asked for.
      script: the command, for hints: "train.sft".
      config: the options, with what files and a resumed run say.
      place: the locked folder.
      console: console of this run.
      stop: tells of signals.
      inputs: rows, examples and batches, and the model without its weights.
      end: the number of the last step that is taken now; less than all where the run pauses.
      about: what the saved adapter says of its base.
      hint: tells an interrupted user how to go on.
      loss: the function to minimise.
      space: the subspace that it trains in; None for the adapter's own.
    """

    asked: AskedRun
    script: str
    config: Options
    place: OutputFolder
    console: Console
    stop: Stop
    inputs: Inputs
    end: int
    about: dict[str, Any]
    hint: str
    loss: Loss
    space: Subspace | None

    @property
    def name(self) -> str:
        """The name among the runs of a table."""
        return self.asked.name

    @property
    def task(self) -> Task:
        """The task that the run trains on."""
        return self.asked.task

    @property
    def folder(self) -> Path:
        """The folder of its files; of one in a bucket, the working copy."""
        return self.place.path

    @property
    def pauses(self) -> bool:
        """True if it is saved before its last step, to go on later."""
        return self.end < self.inputs.steps

    @property
    def watched(self) -> Mapping[str, str]:
        """The metrics to look at in training; see `Task`."""
        return {**self.task.watched, **self.inputs.read.data.watched}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BegunRun:
    """A run with an adapter and a state, new or resumed, whose folder is its own now.

    `train.stages.begin.begin_run` makes it.

    Attributes:
      opened: the run as it was opened, with the data that the task has prepared.
      evaluation: before and after training; None for a task without one.
      best: keeps the best adapter; None without --keep-best.
      batch: a batch of the largest shape, to compile the step for.
      start: the start, its state as shapes.
      arrays: the arrays of the state: the state itself, or the adapter that takes its steps beside
        others. The step's driver takes them.
    """

    opened: OpenedRun
    evaluation: Evaluation | None
    best: Best | None
    batch: HostBatch
    start: Handover[TrainingStart]
    arrays: Handover[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledRun:
    """A run whose step is compiled, so that its policy of rematerialisation is known.

    `train.stages.compile.compile_runs` makes it.

    Attributes:
      opened: the run; its options, as its config.yaml, have the policy.
      evaluation, best: see `BegunRun`.
      start: the start, its state as shapes, which `drive` takes.
    """

    opened: OpenedRun
    evaluation: Evaluation | None
    best: Best | None
    start: Handover[TrainingStart]


class Compilation(NamedTuple):
    """The compilations of a single run: their seconds, and the bytes of the step by kind."""

    seconds: float
    further_seconds: float
    sizes: dict[str, int]


class StepDriver(Protocol):
    """Takes the compiled steps of runs: `StepsAlone` or `StepsTogether`."""

    @property
    def forward(self) -> Forward:
        """The adapted function that the loss calls."""

    def state(self, name: str) -> State:
        """Returns the state of a run after the steps so far."""

    def compilation(self, seconds: float, clock: StepClock) -> Compilation | None:
        """Returns the costs of compiling the step of a single run; None for that of many."""


# Compiles the step for a model; returns its driver, and the bytes that it takes, if they are known.
StepCompiler = Callable[[Model], tuple[StepDriver, int | None]]


class CompiledRuns(NamedTuple):
    """The runs that take their steps together.

    Attributes:
      runs: the runs, by name.
      driver: takes their steps, once `train` has taken it.
      base: the model that they share, with their policy of rematerialisation.
      seconds: the time of the compilation.
    """

    runs: dict[str, CompiledRun]
    driver: Handover[Any]
    base: SharedModel
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that came to its last step, and whose adapter is saved.

    `train` of an arrangement makes it.

    Attributes:
      opened: the run.
      evaluation, best: see `BegunRun`.
      tree: the adapted tree, which `measure` takes.
      last_step: the number of the last step.
      step_times: the seconds of a step; None where this process took none.
      compilation: the compilations; None beside other runs.
    """

    opened: OpenedRun
    evaluation: Evaluation | None
    best: Best | None
    tree: Handover[Tree]
    last_step: int
    step_times: StepTimes | None
    compilation: Compilation | None

    @property
    def state(self) -> str:
        """The way in which it ended, in words."""
        return "ended early" if self.best is not None and self.best.is_over else "done"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run with a report and with scores; `train.stages.finish.measure_run` makes it.

    Attributes:
      opened: the run.
      report: the content of report.json, without the scores; see `RunReport`.
      scores: the task's scores; {} where nothing was evaluated.
      is_unchanged: whether it was finished when it was opened.
    """

    opened: OpenedRun
    report: Mapping[str, Any]
    scores: dict[str, float]
    is_unchanged: bool = False

    @property
    def best(self) -> Mapping[str, Any]:
        """The facts about its best adapter; {} without --keep-best."""
        return self.report.get("best", {})

    @property
    def state(self) -> str:
        """The way in which it ended, in words."""
        return "ended early" if self.report.get("ended_early") else "done"

    @property
    def score(self) -> float | None:
        """The task's score; None where it is not known."""
        return self.scores.get(self.opened.task.score or "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PausedRun:
    """A run that is saved before its last step, without report and scores.

    Attributes:
      opened: the run.
      best: the facts about its best adapter so far; {} without --keep-best.
    """

    opened: OpenedRun
    best: Mapping[str, Any]
    state = "paused"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailedRun:
    """A run that an error or a signal ended; the error of a single run ends the command instead.

    Attributes:
      opened: the run.
      best: the facts about its best adapter so far; {} without --keep-best.
      error: the error; `Stopped` after a signal.
    """

    opened: OpenedRun
    best: Mapping[str, Any]
    error: BaseException

    @property
    def state(self) -> str:
        """The way in which it ended, in a word."""
        return "stopped" if isinstance(self.error, Stopped) else "failed"

    @property
    def reason(self) -> str | None:
        """The first line of the error; None for a signal."""
        error = self.error
        if isinstance(error, Stopped):
            return None
        message = error.said(flag) if isinstance(error, TrainingError) else f"{error!r}"
        return message.strip().splitlines()[0]


def best_facts(best: Best | None) -> Mapping[str, Any]:
    """Returns the facts about the best adapter so far; {} without --keep-best."""
    return {} if best is None else best.about


RunEnding = FinishedRun | PausedRun | FailedRun
EndedTraining = TrainedRun | PausedRun | FailedRun
