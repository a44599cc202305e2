"""The stages of a run as types, in their order, and the endings of a run.

One function makes each type from the one before it, and the type names this function. A run of a
table and a single run have the same stages. Large contents are handed over: once a stage has taken
them, the stage before no longer holds them.
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
from train.stages.estimate import StepEstimate
from train.stages.inputs import InputReader, Inputs

Content = TypeVar("Content")


class Handover(Generic[Content]):
    """Holds a large object, such as weights, until the next stage takes it."""

    def __init__(self, content: Content) -> None:
        self._contents = [content]

    @property
    def content(self) -> Content:
        """The content, which stays here."""
        (content,) = self._contents
        return content

    def take(self) -> Content:
        """Returns the content and no longer holds it."""
        return self._contents.pop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """The step at which runs pause, and the objects that runs over the same base share.

    Attributes:
      until: returns the step to pause after, from the number of all steps and the run's options. A
        paused run is saved but not evaluated, and --resume continues it. None trains to the end.
      on_trained: receives each trained run, the adapted tree, and the function that applies the
        tree.
      hint: tells an interrupted user how to resume; None for this command line with --resume.
      measured: the evaluations of the base so far. Later evaluations reuse their scores and are
        added to the list.
      reader: reads rows once for all runs of the same data.
      is_prior: whether another run starts from the trained model and prints the ending for both.
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
class RequestedRun:
    """A run that a command line, a line of a table, or another command requests.

    Attributes:
      name: the name of the run in a table; "" for a single run.
      where: the location of the request for messages, such as "--many runs.csv, line 3", or "".
      options: the checked options of the run, with the task's defaults.
      task: the task that the run trains on.
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
      requested: the requested run.
      script: the command for hints, such as "train.sft".
      config: the options, completed from files and from a resumed run.
      place: the locked folder.
      console: the console of this run.
      stop: reports signals.
      inputs: rows, examples and batches, and the model without its weights.
      end: the number of the last step before the run ends or pauses.
      about: the facts about the base that are saved with the adapter.
      hint: tells an interrupted user how to resume.
      loss: the function to minimise.
      space: the subspace of --intrinsic; None for an adapter.
    """

    requested: RequestedRun
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
        return self.requested.name

    @property
    def task(self) -> Task:
        """The task that the run trains on."""
        return self.requested.task

    @property
    def folder(self) -> Path:
        """The folder of the run's files; for a folder in a bucket, the working copy."""
        return self.place.path

    @property
    def pauses(self) -> bool:
        """True if the run pauses before its last step."""
        return self.end < self.inputs.steps

    @property
    def watched(self) -> Mapping[str, str]:
        """The metrics to watch during training; see `Task`."""
        return {**self.task.watched, **self.inputs.read.data.watched}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BegunRun:
    """A run with an adapter and a new or resumed state, which has written its options.

    `train.stages.begin.begin_run` makes it.

    Attributes:
      opened: the opened run, with the data that the task has prepared.
      evaluation: the evaluation before and after training; None for a task without one.
      best: keeps the best adapter; None without --keep-best.
      batch: a batch of the largest shape, to compile the step for.
      start: the start, whose state has shapes instead of arrays.
      arrays: the arrays of the state, which the step's driver takes: the state itself, or the
        adapter of a run that trains side by side.
    """

    opened: OpenedRun
    evaluation: Evaluation | None
    best: Best | None
    batch: HostBatch
    start: Handover[TrainingStart]
    arrays: Handover[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledRun:
    """A run whose step is compiled, so that its rematerialisation policy is known.

    `train.stages.compile.compile_runs` makes it.

    Attributes:
      opened: the run; its options and its config.yaml contain the policy.
      evaluation, best: see `BegunRun`.
      start: the start, with shapes instead of arrays, which `drive` takes.
    """

    opened: OpenedRun
    evaluation: Evaluation | None
    best: Best | None
    start: Handover[TrainingStart]


class Compilation(NamedTuple):
    """The compilations of a single run.

    Attributes:
      seconds: seconds of compiling the step.
      further_seconds: seconds of later compilations.
      sizes: bytes of the step, by kind.
      estimate: the compiler's estimate of the step's time; None if there is none.
    """

    seconds: float
    further_seconds: float
    sizes: dict[str, int]
    estimate: StepEstimate | None


class StepDriver(Protocol):
    """Takes the compiled steps of runs: `StepsAlone` or `StepsTogether`."""

    @property
    def forward(self) -> Forward:
        """The adapted function that the loss calls."""

    def state(self, name: str) -> State:
        """Returns the state of a run after the steps so far."""

    @property
    def estimate(self) -> StepEstimate | None:
        """The compiler's estimate of the step of a single run; None for several runs."""

    def compilation(self, seconds: float, clock: StepClock) -> Compilation | None:
        """Returns the costs of compiling the step of a single run; None for several runs."""


# Compiles the step for a model; returns its driver, and the bytes of the step if they are known.
StepCompiler = Callable[[Model], tuple[StepDriver, int | None]]


class CompiledRuns(NamedTuple):
    """The runs that take their steps together.

    Attributes:
      runs: the runs, by name.
      driver: the driver of the steps, which `train` takes.
      base: the model that the runs share, with their rematerialisation policy.
      seconds: the time of the compilation.
    """

    runs: dict[str, CompiledRun]
    driver: Handover[Any]
    base: SharedModel
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that reached its last step and saved its adapter.

    `train` of an arrangement makes it.

    Attributes:
      opened: the run.
      evaluation, best: see `BegunRun`.
      tree: the adapted tree, which `measure` takes.
      last_step: the number of the last step.
      step_times: the seconds of a step; None if this process took no step.
      compilation: the compilations; None for runs side by side.
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
        """The way in which the run ended: "done" or "ended early"."""
        return "ended early" if self.best is not None and self.best.is_over else "done"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run with a report and with scores; `train.stages.finish.measure_run` makes it.

    Attributes:
      opened: the run.
      report: the content of report.json, without the scores; see `RunReport`.
      scores: the task's scores; {} if nothing was evaluated.
      is_unchanged: whether the run was finished already when it was opened.
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
        """The way in which the run ended: "done" or "ended early"."""
        return "ended early" if self.report.get("ended_early") else "done"

    @property
    def score(self) -> float | None:
        """The task's score; None if it is unknown."""
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
        """The way in which the run ended: "stopped" by a signal, or "failed"."""
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
