"""Makes the runs of a comparison, and checks them against the model and the data."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lora_jax as lj
from lora_jax.training.errors import TrainingError
from lora_jax.training.losses import HELD_OUT, SCORE
from train.compare import arms
from train.compare.options import (
    IN_FULL,
    METHODS,
    OF_CLASSIFIER,
    OF_EXAMPLES,
    OF_SUBSPACE,
    WITH_OWN_RATE,
    CompareConfig,
    has_adapter,
)
from train.compare.result import Arm
from train.compare.rungs import MEASUREMENTS_PER_RUN
from train.console.errors import UserError, flag
from train.options.common import Options
from train.options.defaults import Defaults
from train.options.field import idle_options
from train.options.file import replace_options
from train.processes.mesh import make_mesh
from train.run.rules import rules
from train.run.task import Task
from train.settings.tasks import dataset_facts
from train.stages.inputs import InputReader, Inputs, make_inputs

RUNS = "runs"
_CLASSIFIER_EVAL_ROWS = 512  # of a classifier's test rows, to measure the loss on while training


class ComparedScript(NamedTuple):
    """A training script that can be compared.

    Attributes:
      name: name of its module: "train.sft".
      compared: the options of a comparison of its runs, none of them given.
      plain: its own options, none of them given.
      task_of, check: see `train.sft`.
      with_defaults: fills in a task's defaults.
      every: option that says how often runs are measured on held-out rows: "eval_every" for their
        loss, "score_every" for the task's score, by which they are compared and stopped early.
      quick: options of a first look, where they are not given.
      quick_full: the multiples of the script's learning rate that it then tries in full
        fine-tuning.
    """

    name: str
    compared: Options
    plain: Options
    task_of: Callable[[Any], Task]
    check: Callable[[Any], None]
    with_defaults: Callable[[Any, Defaults], Options]
    quick: Mapping[str, object]
    quick_full: tuple[float, ...]
    every: Literal["eval_every", "score_every"] = "eval_every"

    @property
    def kind(self) -> str:
        """The word for the script on the command line: "sft"."""
        return self.name.removeprefix("train.")

    @property
    def uses_score(self) -> bool:
        """True if runs are compared by the task's score; else by the held-out loss."""
        return self.every == "score_every"

    def options_of(self, config: Options) -> Options:
        """Extracts the options of the script from the options of a comparison."""
        return type(self.plain)(**{name: getattr(config, name) for name in vars(self.plain)})

    def completed(self, options: Options, **changes: object) -> Options:
        """Returns the options of a run with changes and the task's defaults."""
        changed = replace_options(options, changes)
        return self.with_defaults(changed, self.task_of(changed).defaults)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A planned run.

    Attributes:
      name: name of its folder.
      script: the training script: "train.sft".
      arm, seed: what it trains.
      config: its options, checked, with the task's defaults.
      task: what it trains on.
      steps: number of steps of the whole run.
      trained_parameters: how many numbers it trains.
      by_score: whether it is compared by the task's score; else by the held-out loss.
      most_questions: the largest --eval-questions that its data has questions for; None where
        another value changes nothing, or that is not known.
    """

    name: str
    script: str
    arm: Arm
    seed: int
    config: Options
    task: Task
    steps: int
    trained_parameters: int
    by_score: bool = False
    most_questions: int | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.output)

    @property
    def measured(self) -> str:
        """The metric that decides early stopping."""
        return f"{SCORE}{self.task.score}" if self.by_score else f"{HELD_OUT}loss"

    @property
    def reads_alone(self) -> bool:
        """True if the run cannot share its data, such as prompts with their drawn completions."""
        return "output" in self.task.reads(self.config)


def script_defaults(script: ComparedScript, options: Options) -> arms.ScriptDefaults:
    """Returns the default settings of the script: learning rates, alpha and batch size.

    Raises:
      UserError: the optimiser has no learning rate of its own, and none was given.
    """
    rates: dict[str, float] = {}
    names = ["lora", *WITH_OWN_RATE, "full"]
    if hasattr(options.adapter, "head_only"):
        names += OF_CLASSIFIER
    for name in names:
        method_options = dict(METHODS[name].sets)
        if name in OF_SUBSPACE:
            method_options["intrinsic"] = 10_000  # for which rates are given: `rate_of_dimension`
        completed = script.completed(options, **method_options)
        if completed.optim.lr is None:
            raise UserError(
                f"{flag('optimizer', options.optim.optimizer)} has no default learning rate. Pass "
                "--lrs, and --full-lrs for full fine-tuning."
            )
        rates[name] = completed.optim.lr
    alpha = script.task_of(options).defaults.alpha
    return arms.ScriptDefaults(
        alpha=alpha,
        rates=rates,
        batch_size=options.optim.batch_size,
        quick_full=script.quick_full,
    )


def make_trials(
    script: ComparedScript,
    options: Options,
    compare: CompareConfig,
    folder: Path,
    reader: InputReader,
    examples: tuple[ComparedScript, Options] | None,
) -> tuple[list[Trial], Inputs]:
    """Makes and checks all runs; returns them with the inputs of one run.

    Args:
      script: the training script.
      options: its options, none of those that the comparison sets.
      compare: what to compare.
      folder: the comparison's.
      reader: reads rows once.
      examples: the script and options of runs on --demonstrations; None for none.

    Raises:
      UserError: some run cannot be done; it is named.
    """
    trials: list[Trial] = []
    inputs: Inputs | None = None
    grid = arms.make_arms(compare, script_defaults(script, options))
    for arm, seed in itertools.product(grid, compare.seeds):
        name = arms.name_of_run(arm, seed)
        is_supervised = arm.method in OF_EXAMPLES
        run_script, run_options = script, options
        if examples and is_supervised:
            run_script, run_options = examples
        try:
            trial, inputs = _make_trial(
                run_script,
                run_options,
                arm,
                seed,
                held_out_seed=compare.seeds[0],
                folder=folder / RUNS / name,
                reader=reader,
            )
        except TrainingError as error:
            raise UserError(f"run {name}: {error.said(flag)}") from error
        trials.append(trial)
    names = [trial.name for trial in trials]
    repeated_names = [name for name in names if names.count(name) > 1]
    if repeated_names:
        raise UserError(
            f"two runs would have the name {repeated_names[0]}, because two of the values differ "
            "by less than a name shows. Remove one of the two values."
        )
    assert inputs is not None
    return trials, inputs


def group_trials(trials: Sequence[Trial], at_once: int) -> list[list[Trial]]:
    """Groups runs for training: up to `at_once` adapters together, every other run alone."""
    adapters = [trial for trial in trials if has_adapter(trial.arm.method)]
    adapters.sort(key=_sharing_key)
    # Runs on examples have a script of their own, so that they share no steps with the others.
    supervised = [trial for trial in adapters if trial.arm.method in OF_EXAMPLES]
    rewarded = [trial for trial in adapters if trial.arm.method not in OF_EXAMPLES]
    groups: list[list[Trial]] = []
    for script_trials in (rewarded, supervised):
        for start in range(0, len(script_trials), at_once):
            groups.append(script_trials[start : start + at_once])
    groups += [[trial] for trial in trials if not has_adapter(trial.arm.method)]
    return groups


def _sharing_key(trial: Trial) -> tuple[object, ...]:
    """Returns a sort key that places runs that can share steps together.

    In one step, adapters of one method, rank and selection share a stack, in which smaller batches
    are filled up to the largest.
    """
    arm = trial.arm
    return arm.rank or 0, arm.method, arm.targets or (), arm.batch_size


def _make_trial(
    script: ComparedScript,
    options: Options,
    arm: Arm,
    seed: int,
    *,
    held_out_seed: int,
    folder: Path,
    reader: InputReader,
) -> tuple[Trial, Inputs]:
    """Makes and checks a run; returns it with its inputs.

    Args:
      script: the training script.
      options: its options, none of those that the comparison sets.
      arm, seed: what the run trains.
      held_out_seed: draws the held-out rows, the same for all runs, unless the options have one.
      folder: the run's.
      reader: reads rows once.
    """
    interval = getattr(options.run, script.every)
    changes = arms.options_of_arm(arm, seed) | {
        "output": str(folder),
        "overwrite": False,
        "resume": False,
        script.every: interval or 1,  # so that rows are held out
    }
    changed_options = replace_options(options, changes)
    holds_rows_out = "held_out_seed" not in idle_options(
        changed_options, dataset_facts(changed_options)
    )
    if holds_rows_out:
        option_seed = getattr(options.data, "held_out_seed", None)
        changes["held_out_seed"] = held_out_seed if option_seed is None else option_seed
    if getattr(options.run, "eval_rows", 0) is None:
        changes["eval_rows"] = _CLASSIFIER_EVAL_ROWS
    config = script.completed(options, **changes)
    task = script.task_of(config)
    script.check(config)
    config = task.completed(config)
    rules(config.adapter)
    mesh = make_mesh(config.run.mesh, config.optim.batch_size)
    inputs = make_inputs(config, mesh, reader(config, task))
    _check_held_out(script, arm, config, inputs)
    n_steps = inputs.steps
    intervals: dict[str, Any] = {script.every: interval or -(-n_steps // MEASUREMENTS_PER_RUN)}
    has_default_saves = options.run.save_every == script.plain.run.save_every
    if arm.method in IN_FULL and has_default_saves:
        intervals["save_every"] = n_steps  # a checkpoint holds the model three times
    config = replace_options(config, intervals)
    trial = Trial(
        name=folder.name,
        script=script.name,
        arm=arm,
        seed=seed,
        config=config,
        task=task,
        steps=n_steps,
        trained_parameters=_count_trained_parameters(arm, config, inputs),
        by_score=script.uses_score,
        most_questions=task.most_questions(config, inputs.read.rows),
    )
    if trial.reads_alone:
        inputs.read.data.close()
    return trial, inputs


def _count_trained_parameters(arm: Arm, config: Options, inputs: Inputs) -> int:
    """Returns the number of trained parameters: a subspace's dimension, or the tree's count."""
    if arm.dimension is not None:
        return arm.dimension
    outline = inputs.read.outline
    tree = lj.lorafy(outline.params, rules(config.adapter, outline), kinds=outline.kinds)
    n_trained, _ = lj.count_params(tree)
    return n_trained


def _check_held_out(script: ComparedScript, arm: Arm, config: Any, inputs: Inputs) -> None:
    """Raises a UserError if no rows are held out for measuring a run."""
    if not script.uses_score:
        has_held_out = inputs.read.data.held_out is not None
    elif arm.method in OF_EXAMPLES:
        has_held_out = True  # the prompts of the others
    else:
        has_prompts = bool(inputs.read.rows.held_out) or dataset_facts(config).has_own_rows
        has_held_out = has_prompts and bool(config.run.eval_questions)
    if not has_held_out:
        raise UserError(
            "nothing is held out, so the runs cannot be compared. Pass --eval-dataset or more "
            "rows, and a positive --eval-questions."
        )
