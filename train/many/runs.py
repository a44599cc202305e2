"""Trains a table of runs over one base side by side, each as if it ran alone.

It reads from top to bottom, as `train.finetune` does: check, load, adapt, train, save, measure. A
run has what it has alone: folder, lock, options, log, checkpoints, best adapter, report; so it can
go on alone, too. One that fails leaves the others alone.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import lora_jax as lj
from lora_jax.bank.together.side_by_side import DrivenRun, RunEnding, side_by_side
from lora_jax.bank.together.tenants import Tenant
from lora_jax.bank.together.together import Together
from lora_jax.training.batches import HostBatch
from lora_jax.training.errors import Interrupted, TrainingError
from lora_jax.training.held_out import compiled_evaluation, held_out_loss
from lora_jax.training.loop import Stopped, training_steps
from lora_jax.training.losses import Loss, Sums
from lora_jax.training.optimizer import has_dropout
from lora_jax.training.processes import write_json
from lora_jax.training.ready import TrainingStart, adapted_tree, final_tree, make_hooks, open_log
from lora_jax.training.run.log import duration
from lora_jax.training.step import State
from train.console.errors import UserError, as_user_errors
from train.console.output import tell
from train.finetune import RunPart, load_model, make_evaluation, make_measures, make_run, prepare
from train.inputs import make_inputs
from train.many.board import Board, BufferedConsole, TeeLog, print_results
from train.many.one import RunRequest, TableRun
from train.options.file import replace_options
from train.options.optim import make_tenant
from train.processes import hosts
from train.processes.cache import keep_compiled
from train.processes.mesh import make_mesh
from train.processes.session import Session
from train.reporters.files import ERROR, write_csv
from train.reporters.registry import check_packages
from train.run.lifecycle import adapt_base, begin_run, keep_adapter, make_report, open_run_log
from train.run.log import doing
from train.run.output import ADAPTER, CONFIG, REPORT, locked_output
from train.run.report import print_adapter, tree_bytes
from train.run.rules import rules
from train.settings.table import RESULTS

FAILED = 1  # the exit code where some runs failed
# Where runs are over, the others' step is compiled anew for fewer if it has as many to take.
_WORTH_COMPILING = 50


def train_many(script: str, asked: Sequence[RunRequest], session: Session) -> None:
    """Trains a table of runs, and writes their results beside their folders.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      asked: the runs, checked, with their tasks' defaults.
      session: tells of signals.

    Raises:
      TrainingError: a row asks for something that cannot be done; nothing was trained.
      Interrupted: after a signal, once the last step of each run is saved.
      SystemExit: with code 1, once all others are done, if a run failed.
    """
    began = time.monotonic()
    console = hosts.console()
    ones = train_rows(script, asked, session, console)
    _finish(ones, console, session, began)


def train_rows(
    script: str,
    asked: Sequence[RunRequest],
    session: Session,
    console: Console,
    part: RunPart | None = None,
) -> list[TableRun]:
    """Trains runs side by side, to their ends or as far as `part` says.

    Args:
      script, asked, session: see `train_many`.
      console: console to print to.
      part: how far they train, and what they share with other runs.

    Returns:
      The runs, in order, each with what came of it: one that failed holds its error, one that a
      signal stopped is saved.

    Raises:
      TrainingError: a row asks for something that cannot be done; nothing was trained.
    """
    part = part or RunPart()
    first = asked[0].row.options
    if cached := keep_compiled(first.run.compilation_cache):
        tell(console, cached)
    rows_at_once = math.gcd(*(row.options.optim.batch_size for row, _ in asked))
    mesh = make_mesh(first.run.mesh, rows_at_once)

    # Cheap checks come first, of all rows. Only then are weights read, once.
    ones: list[TableRun] = []
    for wanted in asked:
        with as_user_errors(TrainingError, prefix=f"{wanted.row.where}: "):
            ones.append(_opened(script, wanted, mesh, session, part))
    with_images = [getattr(one.inputs.read.data.train, "further", None) is not None for one in ones]
    if len({*with_images}) > 1:
        raise UserError(
            f"the rows of {ones[with_images.index(True)].row.name} have images, and those of "
            f"{ones[with_images.index(False)].row.name} have none, and they train side by side: "
            "give each kind a table of its own"
        )
    outline, layout = ones[0].inputs.read.outline, ones[0].inputs.layout
    with doing(console, f"reading the weights of {outline.name}"):
        model, plain = load_model(ones[0].config, outline, layout)
    tell(console, f"{len(ones)} runs train side by side over {outline.name}")

    # The adapters, and the base for comparison.
    tenants = {}
    for one in ones:
        with one.isolate_errors():
            tenants[one.row.name] = _begun(one, model, plain, session.release)
    is_quantized = outline.in_codes
    answering = lj.adapt(model.apply)  # as the model itself answers, not laid out for a step
    evaluated = answering if is_quantized else model.apply
    for one in ones:
        if one.row.name in tenants and one.evaluation and not one.run.pauses:
            part.evaluate_base(one.evaluation, model, plain, evaluated)

    # Training.
    dropped = any(has_dropout(tenant.params) for tenant in tenants.values())
    forward = lj.adapt(layout.constrained(model, dropout=dropped).apply)
    together = Together(forward, plain, compiler_options=layout.compiler_options)
    _train(ones, tenants, together, model, forward, answering, console, session)
    base_bytes = tree_bytes(plain)
    del together, tenants

    # The trained models.
    session.stop.remedy = ones[0].run.hint
    stopped = any(one.state == "stopped" for one in ones)
    for one in ones:
        if one.ending.result is None or one.run.pauses:
            continue
        with one.isolate_errors():
            trained, report = one.ending.result
            report |= {"base_bytes": base_bytes, "side_by_side": len(ones)}
            write_json(one.run.folder / REPORT, report)
            print_adapter(one.run.console, one.run.folder / ADAPTER, report)
            if part.on_trained:
                part.on_trained(one.run, trained, answering)
            if one.evaluation and not stopped:  # a resumed run evaluates what is over
                with doing(console, f"evaluating {one.row.name}"):
                    tree = trained if is_quantized else lj.merge(trained)
                    scores = one.evaluation.after(model, tree, evaluated)
                one.score = scores.get(one.task.score or "")
                del tree
    return ones


def _opened(script: str, asked: RunRequest, mesh: Any, session: Session, part: RunPart) -> TableRun:
    """Returns a run, its options checked, its folder locked and its rows read."""
    row, task = asked
    config, paper = task.completed(row.options), BufferedConsole()
    folder = Path(config.run.output).expanduser()
    going_on = config.run.resume and (folder / CONFIG).exists()
    config = replace_options(config, {"resume": going_on})
    check_packages(config.run.report_to)
    rules(config.adapter)
    folder = locked_output(config, session.release, paper.console)
    read = part.reader(config, task)
    session.release.callback(read.data.close)
    inputs = make_inputs(config, mesh, read)
    for line in inputs.lines:
        tell(paper.console, line)
    run = make_run(script, config, task, session.stop, folder, paper.console, inputs, part)
    return TableRun(row, task, paper, run, inputs, task.loss(config, inputs.layout))


def _begun(one: TableRun, model: Any, plain: Any, held: ExitStack) -> Tenant:
    """Adapts the base for a run, new or resumed; returns what trains beside others."""
    config, run, optim = one.config, one.run, one.config.optim
    outline, data = one.inputs.read.outline, one.inputs.read.data
    key = jax.random.key(optim.seed)
    params = adapt_base(config, outline, plain, run.folder, jax.random.fold_in(key, 0))
    params = run.layout.placed(params)
    ready = begin_run(run, params, jax.random.fold_in(key, 1), data.facts)
    one.inputs, ready = prepare(run, one.inputs, one.task, model, plain, params, ready)
    one.paper.keep_in(run.folder, held)
    (run.folder / ERROR).unlink(missing_ok=True)
    one.evaluation = make_evaluation(run, one.inputs, one.task)
    one.ready = dataclasses.replace(ready, state=jax.eval_shape(lambda: ready.state))
    tenant = make_tenant(
        optim, params, ready.setup.schedule, run.steps, loss=one.loss, key=ready.state.key
    )
    # A new state is made in its slot, where alone it takes memory.
    return dataclasses.replace(tenant, state=ready.state) if int(ready.state.step) else tenant


def _train(
    ones: Sequence[TableRun],
    tenants: dict[str, Tenant],
    together: Together,
    model: Any,
    forward: Callable[..., Any],
    answering: Callable[..., Any],
    console: Console,
    session: Session,
) -> None:
    """Trains all runs as far as each goes."""
    by_name = {one.row.name: one for one in ones if one.row.name in tenants}
    layout = ones[0].inputs.layout
    evaluations: dict[Loss, Callable[..., Sums]] = {}
    board = Board(console, {name: one.run.last for name, one in by_name.items()})

    def turns(one: TableRun) -> Generator[int, tuple[Mapping[str, Any], int], Any]:
        """Yields the steps of a run to take; returns its trained tree and its report."""
        assert one.ready is not None
        name, run, ready, loss = one.row.name, one.run, one.ready, one.loss
        now, tree = functools.partial(together.state, name), functools.partial(adapted_tree, ready)
        evaluation = evaluations.setdefault(
            loss.held_out, compiled_evaluation(layout, forward, loss)
        )
        held_out = functools.partial(held_out_loss, ready, forward, loss, evaluation=evaluation)
        with open_run_log(run, ready, int(now().step)) as own:
            to_measure = make_measures(
                run, one.inputs, one.evaluation, model, tree, answering, held_out, own
            )
            hooks = make_hooks(ready, loss, [*to_measure], run.hint)
            log = TeeLog(own, board, name)
            with open_log(log, ready):
                step_seconds = yield from training_steps(
                    now, run.last, one.config.run, hooks, log, run.stop
                )
            trained = final_tree(ready, now())
            if run.pauses:
                return trained, {}
            keep_adapter(run, ready, trained)
        return trained, make_report(run, ready, trained, loss, step_seconds)

    def ended(name: str, ending: RunEnding) -> None:
        one = by_name[name]
        one.ending = ending
        together.remove(name)
        if ending.error is not None and not isinstance(ending.error, Stopped):
            one.record()
        board.ended(name, one.state)

    with jax.set_mesh(layout.mesh):
        with doing(console, "placing the adapters"):
            together.add(tenants)
            tenants.clear()
        runs = {}
        for name, one in by_name.items():
            assert one.ready is not None
            batch = _batch_of(one.ready, functools.partial(together.state, name))
            runs[name] = DrivenRun(turns=turns(one), batch=batch, tokens=one.ready.feed.tokens)
            board.note(name, {"step": together.done(name)})
        session.stop.remedy = ones[0].run.hint

        def turned() -> None:
            together.shrink(_WORTH_COMPILING)
            board.show()

        with board, session.stop.deferred():
            side_by_side(together.step, runs, ended=ended, turned=turned)
            board.show()


def _batch_of(ready: TrainingStart, now: Callable[[], State]) -> Callable[[int], HostBatch]:
    """Returns the function of a run's batches, which may need its state."""
    if (live := ready.live) is None:
        return ready.feed.batch
    return lambda number: live.batch(number, now())


def _finish(ones: Sequence[TableRun], console: Console, session: Session, began: float) -> None:
    """Writes and prints the results; ends with the exit code."""
    results = [one.result() for one in ones]
    parent = ones[0].run.folder.parent
    write_csv(parent / RESULTS, [results[0], *(one.values() for one in results)])
    print_results(console, [{k: v for k, v in r.items() if k != "error"} for r in results])
    failed = [one for one in ones if one.state == "failed"]
    for one in failed:
        where = one.run.folder / ERROR
        print(f"error: {one.row.name} failed: {one.why} ({where})", file=sys.stderr, flush=True)
    took = duration(time.monotonic() - began)
    tell(console, f"the whole table took {took}; its results are in {parent / RESULTS}")
    hint = session.stop.remedy
    if n := sum(one.state == "stopped" for one in ones):
        raise Interrupted(f"stopped {n} of {len(ones)} runs, each saved. {hint}", session.stop.code)
    session.stop.check()
    if failed:
        print(f"\n{len(failed)} of {len(ones)} runs failed; the others are done", file=sys.stderr)
        sys.exit(FAILED)
