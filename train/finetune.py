"""Trains runs over one base, from their options to their reports; a single run is a table of one.

It reads from top to bottom: check, load, adapt, train, save, measure. A run of a table has what it
has alone: folder, lock, options, log, checkpoints, best adapter, report; so it can go on alone,
too. One that fails leaves the others alone.
"""

import functools
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from rich.console import Console

import lora_jax as lj
from lora_jax.adapt.activate import invocations_of
from lora_jax.bank.together.side_by_side import DrivenRun, RunEnding, side_by_side
from lora_jax.bank.together.tenants import Tenant
from lora_jax.bank.together.together import Together
from lora_jax.buckets.copies import shown
from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.layers.placement import platform_of
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.held_out import FormedTree, compiled_evaluation, held_out_loss
from lora_jax.training.layout import Layout
from lora_jax.training.loop import training_steps
from lora_jax.training.losses import Loss, Sums
from lora_jax.training.memory.ladder import RematChoice
from lora_jax.training.optimizer import has_dropout
from lora_jax.training.processes import write_json
from lora_jax.training.ready import (
    TrainingStart,
    adapted_tree,
    final_tree,
    make_hooks,
    open_log,
)
from lora_jax.training.run.log import duration
from lora_jax.training.setup import CompiledStep
from lora_jax.training.step import Metrics, State
from train.begin import begin_row, check_images, load_model, open_run
from train.console.output import tell
from train.dry_run import rehearse
from train.inputs import make_inputs
from train.options.common import Options
from train.plan.remat import settle_remat
from train.processes import hosts
from train.processes.cache import keep_compiled
from train.processes.mesh import make_mesh
from train.processes.session import Session
from train.progress import make_measures
from train.remat import choose_remat_of, compile_row
from train.run.board import Board, TeeLog
from train.run.intrinsic import merge_trained, model_in
from train.run.lifecycle import keep_adapter, make_report, open_run_log
from train.run.log import doing
from train.run.output import ADAPTER, REPORT
from train.run.pretrained import ModelInfo
from train.run.report import (
    ask_words,
    compiled_bytes,
    print_adapter,
    print_commands,
    print_costs,
    tree_bytes,
)
from train.run.rules import rules
from train.run.task import Task
from train.settings.table import TableRow
from train.table import RunPart, RunRequest, TableRun

# Where runs are over, the others' step is compiled anew for fewer if it has as many to take.
_WORTH_COMPILING = 50


def finetune(
    script: str, config: Options, task: Task, session: Session, part: RunPart | None = None
) -> dict[str, float]:
    """Fine-tunes a model.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      config: its options, checked, with the task's defaults.
      task: says what to train on, and how to measure it.
      session: tells of signals, and ends all processes of a run together.
      part: how far it trains now; None for a run on its own.

    Returns:
      The scores of the trained model by name; {} where nothing was evaluated.

    Raises:
      TrainingError: something that was asked for cannot be done.
      Interrupted: after a signal, once the last step is saved.

    With --dry-run, nothing is trained or written; see `train.dry_run`.
    """
    began = time.monotonic()
    part = part or RunPart()
    hosts.join_hosts(config.run)
    console = hosts.console()
    session.join(console, config.run)
    if config.run.dry_run:
        return _show(config, task, session, part, console)
    request = RunRequest(TableRow(config.run.output, "", frozenset(), config), task)
    (row,) = train_rows(script, [request], session, console, part, alone=True)
    run, report = row.run, row.report
    if run.pauses or report is None:
        tell(console, f"paused after step {run.last} of {run.steps}")
        return {}
    print_costs(console, report)
    tell(console, report["summary"])
    took = duration(time.monotonic() - began)
    console.print(f"the whole run took {took}; its files are in {shown(run.folder)}")
    merged_only = run.config.adapter.full or row.space is not None
    words = ask_words(row.inputs.read.outline)
    print_commands(console, run.folder / ADAPTER, words, merged=merged_only)
    return row.scores


def _show(
    config: Options, task: Task, session: Session, part: RunPart, console: Console
) -> dict[str, float]:
    """Shows a run without running it, for --dry-run."""
    with hosts.raise_in_every_process():
        run = config.run
        mesh = make_mesh(run.mesh, config.optim.batch_size, slice_axis=run.slice_axis)
        config = settle_remat(task.completed(config), platform_of(mesh.devices.flat[0]))
        rules(config.adapter)
        read = part.reader(config, task)
        session.release.callback(read.data.close)
        inputs = make_inputs(config, mesh, read)
    for line in inputs.lines:
        tell(console, line)
    rehearse(config, inputs, task.loss(config, inputs.layout), console)
    return {}


def train_rows(
    script: str,
    requests: Sequence[RunRequest],
    session: Session,
    console: Console,
    part: RunPart | None = None,
    *,
    alone: bool = False,
) -> list[TableRun]:
    """Trains runs side by side, or a single one alone, to their ends or as far as `part` says.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      requests: the runs, checked, with their tasks' defaults.
      session: tells of signals.
      console: console to print to.
      part: how far they train, and what they share with other runs.
      alone: whether the only run has the console and the step to itself, and raises its errors.

    Returns:
      The runs, in order, each with what came of it: one that failed beside others holds its error,
      one that a signal stopped is saved.

    Raises:
      TrainingError: a row asks for something that cannot be done; nothing was trained.
    """
    part = part or RunPart()

    # Cheap checks come first, of all rows: options and output folder, then rows, then examples and
    # targets against the model's configuration. Only then are weights read, once.
    with hosts.raise_in_every_process():
        first = requests[0].row.options
        cached = keep_compiled(first.run.compilation_cache)
        sizes = (request.row.options.optim.batch_size for request in requests)
        axis = first.run.slice_axis
        mesh = make_mesh(first.run.mesh, math.gcd(*sizes), slice_axis=axis)
        own = console if alone else None
        rows = [open_run(script, request, mesh, session, part, own) for request in requests]
        check_images(rows)
        chosen = choose_remat_of(rows)
    if cached:
        tell(console, cached)
    for row in rows:
        tell(row.run.console, *row.inputs.lines)
    config, inputs, space = rows[0].run.config, rows[0].inputs, rows[0].space
    outline, layout = inputs.read.outline, inputs.layout
    with hosts.raise_in_every_process(), doing(console, f"reading the weights of {outline.name}"):
        model, plain = load_model(config.optim, config.adapter, outline, layout)
    if not alone:
        tell(console, f"{len(rows)} runs train side by side over {outline.name}")

    # The adapters, and the base for comparison.
    # A model that recomputes its layers takes long rows by chunks, without a backward pass, too.
    answering = model.clone(remat=False) if layout.keeps_rows else model
    forward = lj.adapt(model_in(space, answering).apply)
    base = _Base(model, outline, layout, tree_bytes(plain), forward)
    tenants: dict[str, Tenant] = {}
    for row in rows:
        with row.isolate_errors():
            if tenant := begin_row(row, model, plain, session.release):
                tenants[row.name] = tenant
    for row in rows:
        if row.error is None and row.evaluation and not row.run.pauses:
            part.evaluate_base(row.evaluation, model, plain, base.evaluated)

    # Training. It leaves each adapter on its own, the loss curve, and a report of its costs.
    if alone:
        del plain
        _train_alone(rows[0], base, chosen)
    else:
        _train_beside(rows, tenants, plain, base, console, session)
        del plain

    # The trained models.
    stopped = any(row.state == "stopped" for row in rows)
    for row in rows:
        if row.report is not None and not row.run.pauses:
            row.report |= {} if alone else {"side_by_side": len(rows)}
            with row.isolate_errors():
                # A resumed run evaluates all.
                _finish(row, base, part, console, evaluates=not stopped)
        row.run.place.send()
    return rows


class _Base(NamedTuple):
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


def _train_alone(row: TableRun, base: _Base, chosen: RematChoice | None) -> None:
    """Trains a single run as far as it goes; raises what ends it."""
    model, forward, step, seconds = compile_row(row, base.model, chosen)
    base, run = base._replace(model=model), row.run
    steps = _StepsAlone(step, row.drop_state())
    run.stop.remedy = run.hint
    running = _running(row, base, forward, steps.state, {})
    (ending,) = side_by_side(steps.take, {row.name: running}).values()
    if ending.error is not None:
        raise ending.error
    row.trained, row.report = ending.result
    row.report |= {"compile_seconds": seconds, "compiled_bytes": compiled_bytes(step)}


def _train_beside(
    rows: Sequence[TableRun],
    tenants: dict[str, Tenant],
    plain: Tree,
    base: _Base,
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
            runs[name] = _running(row, base, forward, now, evaluations, board)
            board.note(name, {"step": together.done(name)})
        session.stop.remedy = rows[0].run.hint
        with board, session.stop.deferred():
            side_by_side(together.step, runs, ended=ended, turned=turned)
            board.show()


def _running(
    row: TableRun,
    base: _Base,
    forward: Forward,
    now: Callable[[], State],
    evaluations: dict[Loss, Callable[..., Sums]],
    board: Board | None = None,
) -> DrivenRun:
    """Returns a run that leaves its steps to a driver; it ends with its tree and its report.

    Args:
      row: the run.
      base: the model.
      forward: the adapted function that the loss calls.
      now: returns the run's state after the steps so far.
      evaluations: the compiled evaluations of held-out examples so far, by their losses.
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
                step_seconds = yield from training_steps(
                    now, run.last, run.config.run, row.hooks, log, run.stop
                )
            trained = final_tree(start, now())
            if run.pauses:
                return trained, {}
            keep_adapter(run, start, trained)
        return trained, make_report(run, start, trained, loss, step_seconds)

    def batch(number: int) -> HostBatch:
        assert row.hooks is not None
        return row.hooks.batch(number, start.state if start.live is None else now())

    return DrivenRun(turns=turns(), batch=batch, tokens=start.feed.tokens)


def _finish(
    row: TableRun, base: _Base, part: RunPart, console: Console, *, evaluates: bool
) -> None:
    """Writes the report of a run that came to its end, and evaluates what it trained."""
    run, adapter = row.run, row.run.folder / ADAPTER
    assert row.report is not None
    if row.is_alone:
        run.stop.remedy = f"The adapter is in {adapter}"
        run.stop.check()
    row.report["base_bytes"] = base.n_bytes
    write_json(run.folder / REPORT, row.report)
    print_adapter(run.console, adapter, row.report)
    if part.on_trained:
        part.on_trained(run, row.trained, base.answering)
    if row.evaluation and evaluates:
        with nullcontext() if row.is_alone else doing(console, f"evaluating {row.name}"):
            tree = row.take_trained()
            # Codes that are merged are the float model, and an activated LoRA has no merged form.
            if base.outline.has_codes or invocations_of(tree):
                row.scores = row.evaluation.after(base.model, tree, base.answering)
            else:
                tree = merge_trained(row.space, tree)
                row.scores = row.evaluation.after(base.model, tree, base.model.apply)
