"""The contract of a task: one object with its rows, examples, loss and evaluation.

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
      measured: the examples whose loss is measured during training; None for all of `held_out`.
      name: returns the name of an example of `train` for messages.
      source: the name of all of `train` for messages; "" if `name` contains it.
      facts: facts about the examples for facts.json.
      lines: lines to print before training.
      feed: returns the batches for a number of steps; None if the batches come from `train`. With
        it, `train` is a sample of the examples.
      steps: returns the number of steps for a number of epochs; None if it follows from `train`.
      row: returns the name of a row from its data set and its number; None for "row 3".
      watched: further metrics to watch during training; see `Task`.
      close: closes resources of the batches, such as processes; may be called twice.
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
        """Returns the examples whose loss is measured during training; None for none."""
        return self.held_out if self.measured is None else self.measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationContext:
    """The parts of a run that a task reads.

    Attributes:
      config: the run's options.
      folder: the folder of the run's files.
      console: console to print to.
      rows, data: the run's rows, and the same rows as examples.
      outline: the model without its weights.
      stop: reports a signal.
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
      layout: the placement of the model and the batches on the mesh.
      model, plain: the model and its parameters, without the adapter.
      ready: the start of training.
      takes_from_base: whether the adapter has changed the base by taking factors from it.
    """

    layout: Layout
    model: Any
    plain: Any
    ready: TrainingStart
    takes_from_base: bool


class EvaluatedModel(NamedTuple):
    """A model to evaluate, with its parameters.

    Attributes:
      model: the model.
      params: the parameters that `forward` takes: plain, quantized, or an adapted tree.
      forward: the model's ``apply``, or the adapted one. Pass the same function again, because
        each new function is compiled.
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
        """Takes another run's scores of the same base, instead of calling `before`.

        Returns:
          True if the other run had such scores. Otherwise nothing changes.
        """

    def score(self, evaluated: EvaluatedModel, progress: Progress) -> dict[str, float]:
        """Returns the scores of an adapted tree by name, the task's `score` if it is known.

        Args:
          evaluated: the model, with an adapted tree.
          progress: may be called in between, equally in all processes; it may raise to end the
            scoring.

        Raises:
          Dropped: a signal came during the scoring; raised in all processes.
        """

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Evaluates the trained model, and writes and prints the scores.

        Returns the scores by name, as `score` does.

        Args:
          evaluated: the model, with merged parameters or an adapted quantized tree.
        """


def reads_all(config: Options) -> tuple[str, ...]:
    """Returns the options --seed, --batch-size and --grad-accum, on which rows may depend."""
    return ("seed", "batch_size", "grad_accum")


class PriorRuns(Protocol):
    """Trains the starting model of a run in another run."""

    def train(self, script: str, config: Options, task: "Task", session: Session) -> None:
        """Fine-tunes with a script's options; see `train.finetune`."""

    def train_base(
        self,
        script: str,
        options: Sequence[str],
        inputs: Sequence[Path],
        folder: Path,
        session: Session,
    ) -> Path:
        """Trains a model in full; see `train.prior`."""


def check_alone(config: Options, product: str) -> None:
    """Raises a UserError if several processes would have to make the starting model of a run."""
    if config.run.distributed or config.run.coordinator:
        raise UserError(
            f"--dataset {config.data.dataset} needs {product}, which only a single process can "
            "make. Start the run once with one process."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The rows, examples, loss and evaluation of a run.

    The functions are called in this order. Each except `loss` and `evaluation` may raise a
    UserError.

    Attributes:
      defaults: the defaults of options that the user did not pass.
      check: raises a UserError for options that do not fit this task.
      completed: fills in options that depend on files, such as a PEFT configuration.
      begin: makes the starting model of a run by earlier runs, if it does not exist yet.
      rows: reads the rows.
      outline: reads the model, without its weights.
      examples: encodes the rows as examples for that model.
      loss: returns the function to minimise, from the options and the layout on the mesh. Equal
        options give equal losses, so that such runs can train side by side.
      evaluation: returns the evaluation of a run; None for none.
      prepare: returns the start of training and its data, if they depend on the model's weights.
      reads: returns further options on which rows and examples depend, although their traits (see
        `Traits`) deny it, such as --seed; or --output if each run has its own rows.
      score: the name of the score of the model's quality, of which higher is better; None if there
        is only the loss.
      watched: the metrics to watch, which a step's line shows, with explanations. The most
        important one comes first. {} shows all metrics.
      baselines: returns the scores of baselines without training, by name, from a run's
        scores.json.
      score_error: returns the standard error of the trained model's score over the held-out rows,
        from a run's scores.json; None if it is unknown.
      question_scores: returns the trained model's score of each held-out question, or row, from a
        run's scores.json; None for a question without a score, and () if scores are unknown.
      most_questions: returns the largest useful --eval-questions for the rows; None if the option
        has no effect, or if the number is unknown.
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
        """Raises a UserError for options that do not fit this task."""
        if config.run.score_every and self.score is None:
            dataset = config.data.dataset
            name = dataset if isinstance(dataset, str) else " ".join(dataset)
            raise UserError(
                f"--score-every {config.run.score_every} has nothing to measure, because --dataset "
                f"{name} has no score except its loss. Use --eval-every, which measures the loss."
            )
        self.check(config)
