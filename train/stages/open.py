"""Opens runs: checks their options, locks their folders, reads their rows."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import jax
from jax.sharding import Mesh

from lora_jax.models.layers.placement import platform_of
from lora_jax.training.errors import TrainingError
from lora_jax.training.processes import is_first
from lora_jax.training.run.checkpoints import Checkpoints
from train.console.errors import UserError, as_user_errors
from train.console.output import tell
from train.console.program import resume_hint
from train.processes import hosts
from train.processes.cache import keep_compiled
from train.processes.mesh import make_mesh
from train.processes.session import Session
from train.reporters.files import read_json
from train.reporters.registry import check_packages
from train.run import output
from train.run.intrinsic import about_space, space_of
from train.run.rules import rules
from train.run.task import Evaluation, EvaluationContext
from train.stages.arrangement import Arrangement
from train.stages.inputs import make_inputs
from train.stages.remat import settle_remat
from train.stages.types import AskedRun, FinishedRun, OpenedRun, RunContext

_ADAPTER_FACTS = ("labels", "seq_len")  # the facts about examples that the adapter keeps


def open_runs(
    script: str,
    asked: Sequence[AskedRun],
    session: Session,
    arrangement: Arrangement,
    context: RunContext,
) -> list[OpenedRun | FinishedRun]:
    """Opens runs, and checks what can be checked before weights are read.

    That is, of all runs: options and output folder, then the data, then examples and targets
    against the model's configuration.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      asked: the runs.
      session: tells of signals, and releases the locks in the end.
      arrangement: says how the runs stand beside each other.
      context: how far they train, and the rows that are read already.

    Returns:
      The runs, in order; a resumed run that is finished, and of which nothing is asked, as such.

    Raises:
      TrainingError: something that was asked for cannot be done; names the line of a table.
    """
    with hosts.raise_in_every_process():
        options = asked[0].options.run
        cache_line = keep_compiled(options.compilation_cache)
        batch_sizes = [run.options.optim.batch_size for run in asked]
        mesh = make_mesh(options.mesh, math.gcd(*batch_sizes), slice_axis=options.slice_axis)
        opened = [open_run(script, run, mesh, session, arrangement, context) for run in asked]
        runs = [finished_run(run, context) or run for run in opened]
        unfinished_runs = [run for run in runs if isinstance(run, OpenedRun)]
        check_images(unfinished_runs)
    if cache_line:
        tell(arrangement.console, cache_line)
    for run in unfinished_runs:
        tell(run.console, *run.inputs.lines)
    finished_names = [run.opened.name for run in runs if isinstance(run, FinishedRun)]
    arrangement.tell(*(f"{name}: finished" for name in finished_names))
    return runs


def open_run(
    script: str,
    asked: AskedRun,
    mesh: Mesh,
    session: Session,
    arrangement: Arrangement,
    context: RunContext,
) -> OpenedRun:
    """Opens a run that is asked for.

    Args:
      asked: the run.
      mesh: the devices.
      script, session, arrangement, context: see `open_runs`.

    Raises:
      TrainingError: something that was asked for cannot be done; names the line of a table.
    """
    prefix = f"{asked.where}: "
    with as_user_errors(TrainingError, prefix=prefix) if asked.where else nullcontext():
        task = asked.task
        console = arrangement.console_of(asked.name)
        config = task.completed(asked.options)
        config = settle_remat(config, platform_of(mesh.devices.flat[0]))
        if is_first():
            check_packages(config.run.report_to)
        rules(config.adapter)
        place = output.locked_output(config, session.release, console)
        read = context.reader(config, task)
        session.release.callback(read.data.close)
        inputs = make_inputs(config, mesh, read)
        space = space_of(config, read.outline.params)
        facts = {name: fact for name, fact in read.data.facts.items() if name in _ADAPTER_FACTS}
        return OpenedRun(
            asked=asked,
            script=script,
            config=config,
            place=place,
            console=console,
            stop=session.stop,
            inputs=inputs,
            end=inputs.steps if context.until is None else context.until(inputs.steps, config),
            about=read.outline.about | about_space(space) | facts,
            hint=context.hint or resume_hint(script),
            loss=task.loss(config, inputs.layout),
            space=space,
        )


def evaluation_context(run: OpenedRun) -> EvaluationContext:
    """Returns the parts of a run that its task reads."""
    read = run.inputs.read
    return EvaluationContext(
        config=run.config,
        folder=run.folder,
        console=run.console,
        rows=read.rows,
        data=read.data,
        outline=read.outline,
        stop=run.stop,
    )


def evaluation_of(run: OpenedRun) -> Evaluation | None:
    """Returns the evaluation of a run; None for a task without one."""
    return run.task.evaluation(evaluation_context(run))


def finished_run(run: OpenedRun, context: RunContext) -> FinishedRun | None:
    """Returns a resumed run that is finished, with its report and its scores; None for others.

    A run without scores that has an evaluation goes on, and so does one whose tree
    `context.on_trained` gets. All processes have to call this.
    """
    if context.on_trained is not None:
        return None
    finished = hosts.map_over_processes(lambda _: is_finished(run), range(jax.process_count()))
    if not all(finished):
        return None
    report = read_json(run.folder / output.REPORT)
    if not report["scores"] and evaluation_of(run) is not None:
        return None
    return FinishedRun(opened=run, report=report, scores=report["scores"], is_unchanged=True)


def is_finished(run: OpenedRun) -> bool:
    """Returns True for a resumed run that is over, if its options ask for nothing longer.

    Its report and scores are written, and its newest checkpoint is whole and of these data.
    """
    options = run.config.run
    has_adapter = (run.folder / output.ADAPTER).exists()
    if run.pauses or not options.resume or not has_adapter:
        return False
    n_steps = run.inputs.steps
    report = read_json(run.folder / output.REPORT)
    if "scores" not in report:
        return False
    last_step = report["last_step"]
    is_long_enough = last_step <= n_steps <= report["steps"]
    if not is_long_enough:
        return False
    checkpoints = Checkpoints(run.folder / output.CHECKPOINTS, options.keep)
    has_last_checkpoint = checkpoints.steps()[-1:] == [last_step]
    saved = checkpoints.run_of_newest() if has_last_checkpoint else None
    checkpoints.close()
    if saved is None:
        return False
    is_of_other_data = saved["data"] != run.inputs.feed.digest()
    if is_of_other_data or saved.get("owed"):
        return False
    n_waited = saved.get("best", {}).get("waited", 0)
    is_out_of_patience = options.patience is not None and n_waited >= options.patience
    return is_out_of_patience or last_step == n_steps


def check_images(runs: Sequence[OpenedRun]) -> None:
    """Raises a UserError where the rows of some runs hold images, and those of others none."""
    runs_with_images: list[OpenedRun] = []
    runs_without: list[OpenedRun] = []
    for run in runs:
        has_images = getattr(run.inputs.read.data.train, "further", None) is not None
        (runs_with_images if has_images else runs_without).append(run)
    if runs_with_images and runs_without:
        raise UserError(
            f"the rows of {runs_with_images[0].name} have images, and those of "
            f"{runs_without[0].name} have none, and they train side by side: "
            "give each kind a table of its own"
        )
