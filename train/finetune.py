"""Trains runs over one base, from their options to their reports.

It reads from top to bottom: a run is asked for, opened, begun, compiled, trained and measured, and
each stage is a type of `train.stages.types`. A run of a table has what it has alone: folder, lock,
options, log, checkpoints, best adapter, report; so it can go on alone, too. One that fails leaves
the others alone.
"""

import time
from collections.abc import Sequence

from rich.console import Console

from lora_jax.buckets.copies import replace_copy_paths
from lora_jax.training.run.log import duration
from train.adapters.source import find_adapter
from train.console.errors import flag
from train.console.output import tell
from train.options.common import Options
from train.processes import hosts
from train.processes.session import Session
from train.run.costs import ask_words, print_commands, print_costs, whole_time
from train.run.output import ADAPTER
from train.run.task import Task
from train.stages.alone import Alone
from train.stages.arrangement import Arrangement
from train.stages.begin import begin_runs, read_base
from train.stages.compile import compile_runs
from train.stages.dry_run import rehearse
from train.stages.finish import measure_runs
from train.stages.open import open_runs
from train.stages.types import (
    BegunRun,
    EndedTraining,
    FinishedRun,
    OpenedRun,
    RequestedRun,
    RunContext,
    RunEnding,
)


def finetune(
    script: str, config: Options, task: Task, session: Session, context: RunContext | None = None
) -> dict[str, float]:
    """Fine-tunes a model.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      config: its options, checked, with the task's defaults.
      task: says what to train on, and how to measure it.
      session: tells of signals, and ends all processes of a run together.
      context: how far it trains now; None for a run on its own.

    Returns:
      The scores of the trained model by name; {} where nothing was evaluated.

    Raises:
      TrainingError: something that was asked for cannot be done.
      Interrupted: after a signal, once the last step is saved.

    With --dry-run, nothing is trained or written; see `train.stages.dry_run`.
    """
    start_time = time.monotonic()
    is_whole = context is None
    context = context or RunContext()
    hosts.join_hosts(config.run)
    console = hosts.console()
    session.join(console, config.run)
    run = RequestedRun(options=config, task=task)
    if config.run.dry_run:
        rehearse(run, session, context, console)
        return {}
    (ending,) = train_runs(script, [run], session, Alone(console), context)
    if not isinstance(ending, FinishedRun):
        opened_run = ending.opened
        tell(console, f"paused after step {opened_run.end} of {opened_run.inputs.steps}")
        return {}
    seconds = time.monotonic() - start_time
    _tell_ending(ending, console, session, context, seconds=seconds, is_whole=is_whole)
    return ending.scores


def train_runs(
    script: str,
    asked: Sequence[RequestedRun],
    session: Session,
    arrangement: Arrangement,
    context: RunContext,
) -> list[RunEnding]:
    """Trains runs over one base, to their ends or to the step at which the context pauses them.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      asked: the runs, checked, with their tasks' defaults.
      session: tells of signals.
      arrangement: that of a single run, or of runs side by side.
      context: how far they train, and what they share with other runs.

    Returns:
      The runs, in order, each as it ended: one that failed beside others holds its error, one that
      a signal stopped is saved.

    Raises:
      TrainingError: a run asks for something that cannot be done; nothing was trained.
    """
    # The options, folders and rows of all runs, before weights are read.
    opened_runs: dict[str, OpenedRun] = {}
    endings: dict[str, RunEnding] = {}
    for run in open_runs(script, asked, session, arrangement, context):
        if isinstance(run, OpenedRun):
            opened_runs[run.name] = run
        else:  # finished before
            endings[run.opened.name] = run
    if not opened_runs:
        return [*endings.values()]

    # The model and its weights, which are read once; the adapters, and the base for comparison.
    first_run = [*opened_runs.values()][0]
    base, weights = read_base(first_run, arrangement.console)
    arrangement.tell(f"{len(opened_runs)} runs train side by side over {base.outline.name}")
    begun_runs: dict[str, BegunRun] = {}
    ended_runs: dict[str, EndedTraining] = {}
    for name, begun in begin_runs(
        opened_runs, base, weights, session, arrangement, context
    ).items():
        if isinstance(begun, BegunRun):
            begun_runs[name] = begun
        else:  # failed at the beginning
            ended_runs[name] = begun

    # The step, with the policy of --remat auto, and the training. It leaves each adapter on its
    # own, and the loss curve.
    if begun_runs:
        compiled_runs = compile_runs(begun_runs, base, weights, arrangement)
        ended_runs |= arrangement.train(compiled_runs)

    # The trained models: their reports and scores.
    runs_in_order = {name: ended_runs[name] for name in opened_runs}
    endings |= measure_runs(runs_in_order, base, arrangement, context)
    return [endings[run.name] for run in asked]


def _tell_ending(
    ending: FinishedRun,
    console: Console,
    session: Session,
    context: RunContext,
    *,
    seconds: float,
    is_whole: bool,
) -> None:
    """Prints the result of a single run, its costs, and the commands that use it.

    Args:
      ending: the run.
      console: console to print to.
      session: knows how long this process works.
      context: says whether another run begins with the trained model.
      seconds: the time that the run took.
      is_whole: whether it is a run on its own.
    """
    run = ending.opened
    report = ending.report
    if ending.is_unchanged:
        last_step = report["last_step"]
        tell(
            console,
            f"{replace_copy_paths(run.folder)} is finished after step {last_step}, and nothing was "
            f"changed. To continue after step {last_step}, increase {flag('steps')} or "
            f"{flag('patience')}.",
        )
        return
    time_line = f"this part of the run took {duration(seconds)}"
    if context.is_prior:
        tell(console, time_line)
        return
    print_costs(console, report)
    tell(console, str(report["summary"]))
    if is_whole:
        time_line = f"the whole run took {whole_time([run.folder], session)}"
    console.print(f"{time_line}; its files are in {replace_copy_paths(run.folder)}")
    outline = run.inputs.read.outline
    adapter = run.folder / ADAPTER
    # Weights that trained in full are no adapter of PEFT's; others are read to be sure.
    is_merged_only = run.config.adapter.full or not find_adapter(str(adapter)).fits_peft(outline)
    print_commands(console, adapter, ask_words(outline), merged=is_merged_only)
