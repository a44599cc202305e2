"""The loop of a run: log, measurements and checkpoints around the steps of a driver."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import nullcontext

import lora_jax as lj
from lora_jax.bank.together.side_by_side import DrivenRun
from lora_jax.core.types import Tree
from lora_jax.training.clock import StepClock
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.held_out import FormedTree, compile_evaluation, held_out_loss
from lora_jax.training.loop import Pace, training_steps
from lora_jax.training.losses import Loss, Sums
from lora_jax.training.processes import is_first
from lora_jax.training.ready import (
    TrainingStart,
    adapted_tree,
    final_tree,
    make_hooks,
    open_log,
)
from lora_jax.training.run.best import Best
from lora_jax.training.step import State
from train.console.output import tell
from train.reporters.files import SAMPLES, read_json, read_lines
from train.reporters.registry import trackers
from train.reporters.reporting import Reporting
from train.run import output
from train.run.board import Board, TeeLog
from train.run.costs import print_best
from train.run.intrinsic import merge_trained
from train.run.log import QuietLog, RunLog, draw_curve, draw_progress, read_metrics
from train.run.task import EvaluatedModel
from train.settings.files import effective_options
from train.stages.estimate import SlowStepWarning
from train.stages.measures import make_measures
from train.stages.types import (
    CompiledRun,
    CompiledRuns,
    Handover,
    OpenedRun,
    PausedRun,
    StepDriver,
    TrainedRun,
    best_facts,
)

Evaluations = dict[Loss, Callable[..., Sums]]  # the compiled evaluations of held-out examples


def drive(
    run: CompiledRun,
    compiled: CompiledRuns,
    driver: StepDriver,
    evaluations: Evaluations,
    clock: StepClock,
    board: Board | None = None,
) -> DrivenRun:
    """Returns the loop of a run, which ends with a `TrainedRun` or a `PausedRun`.

    Args:
      run: the run, whose start is taken.
      compiled: the runs that take their steps together.
      driver: takes the steps.
      evaluations: the compiled evaluations of held-out examples so far, by their losses.
      clock: measures the seconds of the steps of all runs of the driver.
      board: also receives the metrics; None for a single run.
    """
    opened = run.opened
    loss = opened.loss
    start = run.start.take()
    base = compiled.base
    options = opened.config.run
    layout = opened.inputs.layout
    pace = Pace(
        log_every=options.log_every,
        save_every=options.save_every,
        max_skipped=options.max_skipped,
    )
    # With --intrinsic, a measurement forms the weights once and not for each batch.
    formed_tree: FormedTree | None = None
    forward = base.adapted_forward
    if opened.space is not None:
        forward = base.model.apply
        formed_tree = FormedTree(
            functools.partial(merge_trained, opened.space), layout.constrained(base.model).apply
        )
    # Runs with the same loss share the compiled evaluation.
    if loss.held_out not in evaluations:
        evaluated_forward = driver.forward if formed_tree is None else formed_tree.forward
        evaluations[loss.held_out] = compile_evaluation(layout, evaluated_forward, loss)
    held_out = functools.partial(
        held_out_loss,
        start,
        driver.forward,
        loss,
        evaluation=evaluations[loss.held_out],
        formed=formed_tree,
    )
    hooks = make_hooks(start, loss, [], opened.hint)

    def current_state() -> State:
        return driver.state(opened.name)

    def trained_model(state: State) -> EvaluatedModel:
        tree = adapted_tree(start, state)
        if formed_tree is not None:
            tree = formed_tree.form(tree)
        return EvaluatedModel(base.model, tree, forward)

    def run_steps() -> Generator[int, tuple[Mapping[str, object], int], TrainedRun | PausedRun]:
        """Runs the steps between opening and closing the log, and returns the run's ending."""
        with open_run_log(opened, start, int(current_state().step)) as run_log:
            measures = make_measures(opened, run.evaluation, trained_model, held_out, run_log)
            measured_hooks = dataclasses.replace(
                hooks,
                measures=[*measures],
                timed=SlowStepWarning(driver.estimate, functools.partial(tell, opened.console)),
            )
            log = run_log if board is None else TeeLog(run_log, board, opened.name)
            # A table defers signals itself, for all its runs.
            deferral = opened.stop.deferred() if board is None else nullcontext()
            with open_log(log, start), deferral:
                step_times = yield from training_steps(
                    current_state, opened.end, pace, measured_hooks, log, opened.stop, clock
                )
            with clock.paused():
                state = current_state()
                trained_tree = final_tree(start, state)
                if opened.pauses:
                    return PausedRun(opened=opened, best=best_facts(run.best))
                keep_adapter(opened, run.best, trained_tree)
        with clock.paused():
            _draw_curves(opened)
            if run.best is not None:
                print_best(opened.console, run.best, options.patience)
            return TrainedRun(
                opened=opened,
                evaluation=run.evaluation,
                best=run.best,
                tree=Handover(trained_tree),
                last_step=int(state.step),
                step_times=step_times,
                compilation=driver.compilation(compiled.seconds, clock),
            )

    def make_batch(number: int) -> HostBatch:
        # Only completions that are drawn during training depend on the current state.
        state = start.state if start.live is None else current_state()
        return hooks.batch(number, state)

    return DrivenRun(turns=run_steps(), batch=make_batch, tokens=start.feed.tokens)


@contextlib.contextmanager
def open_run_log(run: OpenedRun, start: TrainingStart, done: int) -> Iterator[RunLog | QuietLog]:
    """Opens the reporters of --report-to and yields the run's log, which the loop opens.

    Args:
      run: the run.
      start: the start of the run.
      done: the number of steps that are done already.
    """
    # Only the first process writes a log.
    if not is_first():
        yield QuietLog()
        return
    facts = read_json(run.folder / output.FACTS)
    reporting = Reporting(
        run.folder,
        {name: tracker.reporter for name, tracker in trackers(run.config.run.report_to).items()},
        config=effective_options(run.config) | {"summary": facts.get("summary")},
        project=run.config.run.report_project,
        lines=read_metrics(run.folder),
        samples=read_lines(run.folder / SAMPLES),
        warn=functools.partial(tell, run.console),
    )
    with reporting:
        yield RunLog(
            run.folder,
            run.console,
            first=done,
            last=run.inputs.steps,
            owed=start.owed,
            reporting=reporting,
            watched=run.watched,
        )


def keep_adapter(run: OpenedRun, best: Best | None, trained_tree: Tree) -> None:
    """Saves the adapter of a run that ended."""
    about = {**run.about, **best_facts(best)}
    lj.save_adapter(run.folder / output.ADAPTER, trained_tree, about=about, overwrite=True)


def _draw_curves(run: OpenedRun) -> None:
    """Draws the curves of a run's metrics."""
    if not is_first():
        return
    metrics = read_metrics(run.folder)
    draw_curve(run.folder, metrics, run.loss.label)
    progress_line = draw_progress(run.folder, metrics, run.watched)
    if progress_line:
        tell(run.console, progress_line)
