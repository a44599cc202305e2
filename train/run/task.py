"""The contract of a task: its rows, examples, loss, evaluation and unit, as one object.

A task is a `Task` in a module of `train/tasks`, and "module:NAME" in `train/settings/tasks.py`. A
task that differs from another in some of its functions is made by ``dataclasses.replace``.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from lora_jax.training.data.batches import Examples
from lora_jax.training.data.order import Batches
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss
from lora_jax.training.ready import TrainingStart
from lora_jax.training.run.stop import Stop
from train.console.errors import UserError
from train.options.common import Options
from train.options.defaults import Defaults
from train.processes.session import Session
from train.run.pretrained import ModelInfo


class TaskRows(NamedTuple):
    """Rows before tokenisation.

    Attributes:
      train, held_out: the rows, or the data sets that have them.
    """

    train: list[Any]
    held_out: list[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Rows as examples for a model.

    Attributes:
      train: the examples to train on.
      held_out: the examples to evaluate on; None for none.
      measured: the examples whose loss is measured while training; None for all.
      name: returns the name of one of `train` in messages.
      source: the name of all of `train` in messages; "" where `name` says it.
      facts: facts about the examples for facts.json.
      lines: lines to print before training.
      feed: returns the batches of so many steps, where they are not taken from `train` as a whole;
        `train` is then a sample of them.
      steps: returns the number of steps of so many epochs, where it does not follow from `train`.
      row: returns the name of a row, from its data set and its number; None for "row 3".
      watched: further metrics to look at in training; see `Task`.
      close: ends what the batches need, such as processes; may be called twice.
    """

    train: Examples
    held_out: Examples | None
    name: Callable[[int], str]
    source: str
    facts: dict[str, Any]
    lines: tuple[str, ...] = ()
    feed: Callable[[int], Batches] | None = None
    steps: Callable[[float], int] | None = None
    row: Callable[[int, int], str] | None = None
    measured: Examples | None = None
    watched: Mapping[str, str] = dataclasses.field(default_factory=dict)
    close: Callable[[], None] = lambda: None

    @property
    def measured_on(self) -> Examples | None:
        """Returns the examples whose loss is measured while training; None for none."""
        return self.held_out if self.measured is None else self.measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationContext:
    """The parts of a run that a task reads.

    Attributes:
      config: its options.
      folder: the folder of its files.
      console: console to print to.
      rows, data: its rows, and these as examples.
      outline: the model without its weights.
      stop: tells of a signal.
    """

    config: Any
    folder: Path
    console: Console
    rows: TaskRows
    data: Data
    outline: ModelInfo
    stop: Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelContext(EvaluationContext):
    """The state of a run before its first step, for a task whose batches need the model.

    Attributes:
      layout: the placement of all that follows.
      model, plain: the model and its parameters, without the adapter.
      ready: what training begins with.
      takes_from_base: whether the adapter has taken factors out of the base.
    """

    layout: Layout
    model: Any
    plain: Any
    ready: TrainingStart
    takes_from_base: bool


class EvaluatedModel(NamedTuple):
    """A model that is evaluated, with its parameters.

    Attributes:
      model: the model.
      params: its parameters, as `forward` takes them: plain, in codes, or an adapted tree.
      forward: the model's ``apply``, or that on such a tree. Keep one and pass it again: each new
        function compiles.
    """

    model: Any
    params: Any
    forward: Callable[..., Any]


Progress = Callable[[int, int], None]  # is called with the number done so far, and the total


class Evaluation(Protocol):
    """An evaluation of a model before, during and after training."""

    def before(self, evaluated: EvaluatedModel) -> None:
        """Evaluates the base; its parameters have no adapter."""

    def reuse_base_scores(self, other: "Evaluation") -> bool:
        """Takes another run's measures of the same base, in the place of `before`.

        Returns:
          Whether there was anything to take; if not, nothing has changed.
        """

    def score(self, evaluated: EvaluatedModel, progress: Progress) -> dict[str, float]:
        """Returns the scores of an adapted tree by name, the task's `score` if it is known.

        Args:
          evaluated: the model, with an adapted tree.
          progress: may be called on the way, in all processes alike; ends the scoring by raising.

        Raises:
          Dropped: a signal came meanwhile; raised in all processes.
        """

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Evaluates the trained model; writes and prints the scores.

        Returns the scores by name, as `score` does.

        Args:
          evaluated: the model, with merged parameters or adapted codes.
        """


def reads_all(config: Options) -> tuple[str, ...]:
    """Returns the options --seed, --batch-size and --grad-accum, on which rows may depend."""
    return ("seed", "batch_size", "grad_accum")


class PriorRuns(Protocol):
    """Trains the beginning of a run by another run."""

    def train(self, script: str, config: Options, task: "Task", session: Session) -> None:
        """Fine-tunes by a script with these options; see `train.finetune`."""

    def train_base(
        self,
        script: str,
        options: Sequence[str],
        inputs: Sequence[Path],
        folder: Path,
        session: Session,
    ) -> Path:
        """Trains a model in full; see `train.prior`."""


def check_alone(config: Options, what: str) -> None:
    """Raises a UserError in one of many processes, which cannot make what a run begins with."""
    if config.run.distributed or config.run.coordinator:
        raise UserError(f"--dataset {config.data.dataset}: one process alone makes {what}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The rows, examples, loss and evaluation of a run.

    The functions are called in this order; each but `loss` and `evaluation` may raise a UserError.

    Attributes:
      defaults: the defaults of options that were not given.
      check: raises a UserError for options that make no sense for this task.
      completed: fills in options that depend on files, such as a PEFT configuration.
      begin: makes what a run begins with, where it is not there yet, by runs before it.
      rows: reads the rows.
      outline: reads the model, without its weights.
      examples: encodes the rows as examples for that model.
      loss: returns the function to minimise, from the options and the layout on the mesh. Losses of
        equal options are equal, so that runs with them train side by side.
      evaluation: returns the evaluation of a run; None for none.
      prepare: returns what training begins with, and its data, where these need the model.
      reads: returns the options that rows and examples depend on, of those that say that they do
        not (see `Traits`), such as --seed; --output, where those of each run are its own.
      score: the name of the score that tells how good the model is, the higher the better; None
        where there is none but the loss.
      watched: the metrics to look at in training, which a step's line shows, each explained; the
        most telling one first. {} for all.
      baselines: returns that score of what needs no training, by name, from a run's scores.json.
      score_error: returns the standard error of the trained model's score over the held-out rows,
        from a run's scores.json; None where it is not known.
      question_scores: returns the trained model's score of each held-out question, or row, from a
        run's scores.json; None for a question without one, and () where they are not known.
      most_questions: returns the largest --eval-questions that the rows have questions for; None
        where another value changes nothing, or that is not known.
    """

    defaults: Defaults
    check: Callable[[Any], None] = lambda config: None
    completed: Callable[[Any], Any] = lambda config: config
    begin: Callable[[Any, Session, PriorRuns], Any] = lambda config, session, prior: config
    rows: Callable[[Any], TaskRows]
    outline: Callable[[Any, TaskRows], ModelInfo]
    examples: Callable[[Any, TaskRows, ModelInfo], Data]
    loss: Callable[[Any, Layout], Loss]
    evaluation: Callable[[EvaluationContext], Evaluation | None] = lambda context: None
    prepare: Callable[[ModelContext], tuple[TrainingStart, Data]] = lambda of: (of.ready, of.data)
    reads: Callable[[Any], tuple[str, ...]] = reads_all
    score: str | None = None
    watched: Mapping[str, str] = dataclasses.field(default_factory=dict)
    baselines: Callable[[Mapping[str, Any]], dict[str, float]] = lambda scores: {}
    score_error: Callable[[Mapping[str, Any]], float | None] = lambda scores: None
    question_scores: Callable[[Mapping[str, Any]], Sequence[float | None]] = lambda scores: ()
    most_questions: Callable[[Any, TaskRows], int | None] = lambda config, rows: None

    def check_options(self, config: Options) -> None:
        """Raises a UserError for options that make no sense for this task."""
        if config.run.score_every and self.score is None:
            given = config.data.dataset
            name = given if isinstance(given, str) else " ".join(given)
            raise UserError(
                f"--score-every {config.run.score_every}: --dataset {name} has no "
                "score but its loss: measure that, by --eval-every"
            )
        self.check(config)
