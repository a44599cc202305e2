"""Takes the steps of runs over one base: of a single run, or of many side by side."""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from rich.console import Console

import lora_jax as lj
from lora_jax.bank.together.side_by_side import DrivenRun, RunEnding, side_by_side
from lora_jax.bank.together.tenants import Tenant
from lora_jax.bank.together.together import Together
from lora_jax.core.types import Forward, Model, Tree
from lora_jax.training.clock import StepClock
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.held_out import FormedTree, compiled_evaluation, held_out_loss
from lora_jax.training.layout import Layout
from lora_jax.training.loop import training_steps
from lora_jax.training.losses import Loss, Sums
from lora_jax.training.memory.ladder import RematChoice
from lora_jax.training.optimizer import has_dropout
from lora_jax.training.ready import TrainingStart, adapted_tree, final_tree, make_hooks, open_log
from lora_jax.training.setup import CompiledStep
from lora_jax.training.step import Metrics, State
from train.processes.session import Session
from train.progress import make_measures
from train.remat import compile_row
from train.run.board import Board, TeeLog
from train.run.intrinsic import merge_trained
from train.run.lifecycle import keep_adapter, make_report, open_run_log
from train.run.log import doing
from train.run.pretrained import ModelInfo
from train.run.report import compiled_bytes
from train.table import TableRun

# Where runs are over, the others' step is compiled anew for fewer if it has as many to take.
_WORTH_COMPILING = 50


class SharedModel(NamedTuple):
    """The model that runs share, and the function that answers by an adapted tree of it."""

    model: Model
    outline: ModelInfo
    layout: Layout
    n_bytes: int
    answering: Forward  # as the model itself answers, not laid out for a step

    @property
    def evaluated(self) -> Forward:
        """The function of the trees that are evaluated: plain ones, or codes, which stay codes."""
        return self.answering if self.outline.has_codes else self.model.apply


class _StepsAlone:
    """Takes the steps of a single run, as `Together` takes those of many."""

    def __init__(self, step: CompiledStep, start: TrainingStart) -> None:
        """Begins with the state of `start`, which the first step donates."""
        self._step, self._layout = step, start.setup.layout
        self._state, self._base = start.state, start.base

    def state(self) -> State:
        """Returns the state after the steps so far."""
        return self._state

    def take(self, batches: Mapping[str, HostBatch]) -> dict[str, Metrics]:
        """Takes a step with the run's batch; returns its metrics."""
        ((name, batch),) = batches.items()
        placed = self._layout.batch(batch, parts=True)
        self._state, metrics = self._step(self._state, self._base, placed)
        return {name: metrics}


def train_alone(row: TableRun, base: SharedModel, chosen: RematChoice | None) -> None:
    """Trains a single run as far as it goes; raises what ends it."""
    model, forward, step, seconds = compile_row(row, base.model, chosen)
    base, run = base._replace(model=model), row.run
    steps = _StepsAlone(step, row.drop_state())
    run.stop.remedy = run.hint
    with StepClock() as clock:
        running = _running(row, base, forward, steps.state, {}, clock)
        (ending,) = side_by_side(steps.take, {row.name: running}).values()
    if ending.error is not None:
        raise ending.error
    row.trained, row.report = ending.result
    row.report |= {
        "compile_seconds": seconds,
        "further_compile_seconds": clock.compile_seconds,
        "compiled_bytes": compiled_bytes(step),
    }


def train_beside(
    rows: Sequence[TableRun],
    tenants: dict[str, Tenant],
    plain: Tree,
    base: SharedModel,
    console: Console,
    session: Session,
) -> None:
    """Trains all runs that have begun as far as each goes."""
    by_name = {row.name: row for row in rows if row.name in tenants}
    board = Board(console, {name: row.run.last for name, row in by_name.items()})
    dropped = any(has_dropout(tenant.params) for tenant in tenants.values())
    forward = lj.adapt(base.layout.constrained(base.model, dropout=dropped).apply)
    together = Together(forward, plain, compiler_options=base.layout.compiler_options)
    evaluations: dict[Loss, Callable[..., Sums]] = {}
    clock = StepClock()

    def take_steps(batches: Mapping[str, HostBatch]) -> Mapping[str, Metrics]:
        clock.under_way = together.step(batches)
        return clock.under_way

    def ended(name: str, ending: RunEnding) -> None:
        together.remove(name)
        row = by_name[name]
        if ending.error is not None:
            row.fail(ending.error)
        else:
            row.trained, row.report = ending.result
        board.ended(name, row.state)

    def turned() -> None:
        together.shrink(_WORTH_COMPILING)
        board.show()

    with jax.set_mesh(base.layout.mesh):
        with doing(console, "placing the adapters"):
            together.add(tenants)
            tenants.clear()
        runs = {}
        for name, row in by_name.items():
            now = functools.partial(together.state, name)
            runs[name] = _running(row, base, forward, now, evaluations, clock, board)
            board.note(name, {"step": together.done(name)})
        session.stop.remedy = rows[0].run.hint
        with board, clock, session.stop.deferred():
            side_by_side(take_steps, runs, ended=ended, turned=turned)
            board.show()


def _running(
    row: TableRun,
    base: SharedModel,
    forward: Forward,
    now: Callable[[], State],
    evaluations: dict[Loss, Callable[..., Sums]],
    clock: StepClock,
    board: Board | None = None,
) -> DrivenRun:
    """Returns a run that leaves its steps to a driver; it ends with its tree and its report.

    Args:
      row: the run.
      base: the model.
      forward: the adapted function that the loss calls.
      now: returns the run's state after the steps so far.
      evaluations: the compiled evaluations of held-out examples so far, by their losses.
      clock: measures the seconds of steps, of all runs of the driver.
      board: gets the metrics as well; None for none.
    """
    run, start, loss = row.run, row.start, row.loss
    assert start is not None
    formed, measured = None, base.answering
    if row.space is not None:  # its weights are formed once for each measurement, not in each batch
        measured = base.model.apply
        formed = FormedTree(
            functools.partial(merge_trained, row.space), run.layout.constrained(base.model).apply
        )
    if loss.held_out not in evaluations:
        evaluated = forward if formed is None else formed.forward
        evaluations[loss.held_out] = compiled_evaluation(run.layout, evaluated, loss)
    held_out = functools.partial(
        held_out_loss, start, forward, loss, evaluation=evaluations[loss.held_out], formed=formed
    )

    def tree_of_state(state: State) -> Tree:
        tree = adapted_tree(start, state)
        return tree if formed is None else formed.form(tree)

    def turns() -> Generator[int, tuple[Mapping[str, Any], int], tuple[Tree, dict[str, Any]]]:
        with open_run_log(run, start, int(now().step)) as own:
            measures = make_measures(row, base.model, tree_of_state, measured, held_out, own)
            row.hooks = make_hooks(start, loss, [*measures], run.hint)
            log = own if board is None else TeeLog(own, board, row.name)
            # A table's driver defers signals itself, of all its runs.
            deferral = run.stop.deferred() if board is None else nullcontext()
            with open_log(log, start), deferral:
                step_times = yield from training_steps(
                    now, run.last, run.config.run, row.hooks, log, run.stop, clock
                )
            with clock.paused():
                state = now()
                trained = final_tree(start, state)
                if run.pauses:
                    return trained, {}
                keep_adapter(run, start, trained)
        with clock.paused():
            last_step = int(state.step)
            return trained, make_report(run, start, trained, loss, step_times, last_step)

    def batch(number: int) -> HostBatch:
        assert row.hooks is not None
        return row.hooks.batch(number, start.state if start.live is None else now())

    return DrivenRun(turns=turns(), batch=batch, tokens=start.feed.tokens)
