"""Opens runs: checks their options, locks their folders, and reads their rows."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

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
from train.stages.kernels import KernelTries, keep_kernels
from train.stages.remat import settle_remat
from train.stages.types import FinishedRun, OpenedRun, RequestedRun, RunContext

_ADAPTER_FACTS = ("labels", "seq_len")  # the facts about examples that are saved with the adapter


def open_runs(
    script: str,
    requested: Sequence[RequestedRun],
    session: Session,
    arrangement: Arrangement,
    context: RunContext,
) -> list[OpenedRun | FinishedRun]:
    """Opens runs, and checks everything that does not need the weights.

    For each run, it checks the options and the output folder, then the data, then examples and
    targets against the model's configuration.

    Args:
      script: the command for the hint how to resume, such as "train.sft".
      requested: the requested runs.
      session: reports signals, and releases the locks at the end.
      arrangement: the arrangement of the runs.
      context: the step to stop at, and the rows that are read already.

    Returns:
      The runs, in order. A resumed run with nothing left to do is a `FinishedRun`.

    Raises:
      TrainingError: a run is not possible with its options; names the line of a table.
    """
    with hosts.raise_in_every_process():
        options = requested[0].options.run
        cache_line = keep_compiled(options.compilation_cache)
        batch_sizes = [run.options.optim.batch_size for run in requested]
        mesh = make_mesh(options.mesh, math.gcd(*batch_sizes), slice_axis=options.slice_axis)
        opened = [open_run(script, run, mesh, session, arrangement, context) for run in requested]
        runs: list[OpenedRun | FinishedRun] = []
        for opened_run in opened:
            finished = finished_run(opened_run, context)
            runs.append(opened_run if finished is None else finished)
        check_images([run for run in runs if isinstance(run, OpenedRun)])
        tries = KernelTries()
        runs = [tries.settle(run) if isinstance(run, OpenedRun) else run for run in runs]
    if cache_line:
        tell(arrangement.console, cache_line)
    for run in runs:
        if isinstance(run, OpenedRun):
            tell(run.console, *run.inputs.lines)
    finished_names = [run.opened.name for run in runs if isinstance(run, FinishedRun)]
    arrangement.tell(*(f"{name}: finished" for name in finished_names))
    return runs


def open_run(
    script: str,
    requested: RequestedRun,
    mesh: Mesh,
    session: Session,
    arrangement: Arrangement,
    context: RunContext,
) -> OpenedRun:
    """Opens a requested run.

    Args:
      requested: the run.
      mesh: the devices.
      script, session, arrangement, context: see `open_runs`.

    Raises:
      TrainingError: the run is not possible with its options; names the line of a table.
    """
    # Errors of a run of a table name its line.
    error_context: AbstractContextManager[object] = nullcontext()
    if requested.where:
        error_context = as_user_errors(TrainingError, prefix=f"{requested.where}: ")
    with error_context:
        task = requested.task
        console = arrangement.console_of(requested.name)
        config = task.completed(requested.options)
        config = keep_kernels(settle_remat(config, platform_of(mesh.devices.flat[0])))
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
            requested=requested,
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
    """Returns a finished resumed run with its report and its scores; None for other runs.

    A run whose evaluation is still missing continues, and so does a run whose tree goes to
    `context.on_trained`. All processes must call this function.
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
    """Returns True for a resumed run that ended, unless its options now ask for more steps.

    Such a run has its report and scores, and its newest checkpoint is complete and fits the data.
    """
    options = run.config.run
    has_adapter = (run.folder / output.ADAPTER).exists()
    if run.pauses or not options.resume or not has_adapter:
        return False
    # The report has scores once the run was evaluated.
    n_steps = run.inputs.steps
    report = read_json(run.folder / output.REPORT)
    if "scores" not in report:
        return False
    last_step = report["last_step"]
    is_long_enough = last_step <= n_steps <= report["steps"]
    if not is_long_enough:
        return False
    # The newest checkpoint must be that of the last step.
    checkpoints = Checkpoints(run.folder / output.CHECKPOINTS, options.keep)
    has_last_checkpoint = checkpoints.steps()[-1:] == [last_step]
    saved = checkpoints.run_of_newest() if has_last_checkpoint else None
    checkpoints.close()
    if saved is None:
        return False
    is_of_other_data = saved["data"] != run.inputs.feed.digest()
    if is_of_other_data or saved.get("owed"):
        return False
    # --patience may have ended the run early.
    n_waited = saved.get("best", {}).get("waited", 0)
    is_out_of_patience = options.patience is not None and n_waited >= options.patience
    return is_out_of_patience or last_step == n_steps


def check_images(runs: Sequence[OpenedRun]) -> None:
    """Raises a UserError if the rows of only some of the runs hold images."""
    runs_with_images: list[OpenedRun] = []
    runs_without: list[OpenedRun] = []
    for run in runs:
        has_images = getattr(run.inputs.read.data.train, "further", None) is not None
        if has_images:
            runs_with_images.append(run)
        else:
            runs_without.append(run)
    if runs_with_images and runs_without:
        raise UserError(
            f"The rows of {runs_with_images[0].name} have images, but the rows of "
            f"{runs_without[0].name} have none. Such runs cannot train side by side. Write a "
            "separate table for each kind."
        )
