"""The runs of a comparison, checked against model and data before anything is trained."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lora_jax as lj
from lora_jax.training.errors import TrainingError
from train.compare import arms
from train.compare.options import (
    OF_CLASSIFIER,
    OF_SUBSPACE,
    WITH_OWN_RATE,
    CompareConfig,
    has_adapter,
)
from train.compare.peft_experiment import read_experiment
from train.compare.result import Arm
from train.compare.rungs import MEASUREMENTS
from train.compare.script import Script
from train.console.errors import UserError, flag
from train.inputs import Inputs, Reader, inputs_of
from train.options.field import Shared, idle_options, traits_of
from train.options.file import replaced
from train.processes.mesh import make_mesh
from train.run.intrinsic import space_of
from train.run.rules import rules
from train.tasks.task import Task

RUNS = "runs"
_EVAL_ROWS = 512  # of a classifier's test rows, to measure the loss on while training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A run to come.

    Attributes:
      name: name of its folder.
      arm, seed: what it trains.
      config: its options, checked, with the task's defaults.
      task: what it trains on.
      steps: number of steps of the whole run.
      trained_parameters: how many numbers it trains.
    """

    name: str
    arm: Arm
    seed: int
    config: Any
    task: Task
    steps: int
    trained_parameters: int

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.output)


def basis_of(script: Script, options: Any) -> arms.Basis:
    """Returns the settings that the script would choose by itself.

    Raises:
      UserError: the optimiser has no learning rate of its own, and none was given.
    """
    rates: dict[str, float] = {}
    names = ["lora", *WITH_OWN_RATE, "full"]
    if hasattr(options.adapter, "head_only"):
        names += OF_CLASSIFIER
    for name in names:
        given = dict(arms.METHODS[name])
        if name in OF_SUBSPACE:
            given["intrinsic"] = 10_000  # for which rates are given; see `rate_of_dimension`
        completed = script.completed(options, **given)
        if completed.optim.lr is None:
            raise UserError(
                f"{flag('optimizer', options.optim.optimizer)} has no learning rate of its own: "
                "give --lrs, and --full-lrs for full"
            )
        rates[name] = completed.optim.lr
    alpha = script.task_of(options).defaults.alpha
    return arms.Basis(alpha, rates, options.optim.batch_size, script.quick_full)


def trials_of(
    script: Script,
    options: Any,
    compare: CompareConfig,
    given: Collection[str],
    folder: Path,
    reader: Reader,
) -> tuple[list[Trial], Inputs]:
    """Returns all runs, checked, and the inputs of one of them.

    Args:
      script: the training script.
      options: its options, none of those that the comparison sets.
      compare: what to compare.
      given: the names of the options that were given.
      folder: the comparison's.
      reader: reads rows once.

    Raises:
      UserError: some run cannot be done; it is named.
    """
    trials: list[Trial] = []
    inputs: Inputs | None = None
    counted: dict[Any, int] = {}
    asked = _asked(script, options, compare, given)
    first_seed = asked[0].seed
    for arm, seed, own in asked:
        name = arms.name_of(arm, seed)
        try:
            changed = replaced(options, own)
            trial, inputs = _trial(script, changed, arm, seed, first_seed, folder, reader, counted)
        except TrainingError as error:
            raise UserError(f"run {name}: {error.said(flag)}") from error
        trials.append(trial)
    names = [trial.name for trial in trials]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two runs are called {twice[0]}: leave out settings that are nearly equal")
    assert inputs is not None
    return trials, inputs


def groups_of(trials: Sequence[Trial], at_once: int) -> list[list[Trial]]:
    """Returns the runs as they train: adapters in groups of at most `at_once`, the others alone."""
    adapters = [trial for trial in trials if has_adapter(trial.arm.method)]
    adapters.sort(key=_likeness)
    groups = [adapters[i : i + at_once] for i in range(0, len(adapters), at_once)]
    return groups + [[trial] for trial in trials if not has_adapter(trial.arm.method)]


def _likeness(trial: Trial) -> tuple[Any, ...]:
    """Returns the key that sorts runs by what they can share.

    In one step, adapters of one method, rank and selection share a stack, in which smaller batches
    are filled up to the largest.
    """
    arm = trial.arm
    return arm.rank or 0, arm.method, arm.targets or (), arm.batch_size


class _Asked(NamedTuple):
    """A run, and options of its own beside its arm's."""

    arm: Arm
    seed: int
    own: dict[str, Any]


def _asked(
    script: Script, options: Any, compare: CompareConfig, given: Collection[str]
) -> list[_Asked]:
    """Returns all runs that are asked for."""
    if not compare.peft_experiments:
        grid = arms.arms_of(compare, basis_of(script, options))
        return [_Asked(arm, seed, {}) for arm in grid for seed in compare.seeds]
    found = [read_experiment(Path(folder).expanduser()) for folder in compare.peft_experiments]
    runs: list[_Asked] = []
    for one in found:
        seeds = compare.seeds if "seeds" in given else (one.seed,)
        own = {name: value for name, value in one.options.items() if name not in given}
        runs += [_Asked(one.arm, seed, own) for seed in seeds]
    of_base = [k for k, traits in traits_of(options).items() if traits.shared is Shared.BASE]
    for name in of_base:
        values = {run.own[name]: run for run in runs if name in run.own}
        if len(values) > 1:
            raise UserError(
                f"--peft-experiments: their {name} is {' and '.join(map(str, values))}, and all "
                f"runs of a comparison share it: give {flag(name)}, or compare them one by one"
            )
    return runs


def _trial(
    script: Script,
    options: Any,
    arm: Arm,
    seed: int,
    first_seed: int,
    folder: Path,
    reader: Reader,
    counted: dict[Any, int],
) -> tuple[Trial, Inputs]:
    name = arms.name_of(arm, seed)
    run_folder = folder / RUNS / name
    changes = arms.settings(arm, seed) | {
        "output": str(run_folder),
        "overwrite": False,
        "resume": False,
        "eval_every": options.run.eval_every or 1,  # so that rows are held out
    }
    if "held_out_seed" not in idle_options(replaced(options, changes)):
        drawn = getattr(options.data, "held_out_seed", None)
        changes["held_out_seed"] = first_seed if drawn is None else drawn  # the same for all
    if getattr(options.run, "eval_rows", 0) is None:
        changes["eval_rows"] = _EVAL_ROWS
    config = script.completed(options, **changes)
    task = script.task_of(config)
    script.check(config)
    config = task.completed(config)
    rules(config.adapter)
    mesh = make_mesh(config.run.mesh, config.optim.batch_size)
    inputs = inputs_of(config, mesh, reader(config, task))
    steps = inputs.steps
    if inputs.read.data.held_out is None:
        raise UserError(
            "nothing is held out to compare the runs on: give --eval-dataset, or more rows, and "
            "more than 0 --eval-questions"
        )
    changed = {"eval_every": options.run.eval_every or -(-steps // MEASUREMENTS)}
    if arm.method == "full" and options.run.save_every == script.plain.run.save_every:
        changed["save_every"] = steps  # a checkpoint holds the model three times
    config = replaced(config, changed)
    kind = dataclasses.replace(config.adapter, alpha=None)
    if arm.dimension is not None:
        space_of(config, inputs.read.outline.params)  # raises if there is none
        counted[kind] = arm.dimension
    if kind not in counted:
        outline = inputs.read.outline
        chosen = rules(config.adapter, outline)
        tree = lj.lorafy(outline.params, chosen, kinds=outline.kinds)
        counted[kind] = lj.count_params(tree)[0]
    trial = Trial(
        name=name,
        arm=arm,
        seed=seed,
        config=config,
        task=task,
        steps=steps,
        trained_parameters=counted[kind],
    )
    return trial, inputs
