"""Trains runs over one base, from their options to their reports; a single run is a table of one.

It reads from top to bottom: check, load, adapt, train, save, measure. A run of a table has what it
has alone: folder, lock, options, log, checkpoints, best adapter, report; so it can go on alone,
too. One that fails leaves the others alone.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext

from rich.console import Console

import lora_jax as lj
from lora_jax.adapt.activate import invocations_of
from lora_jax.bank.together.tenants import Tenant
from lora_jax.buckets.copies import shown
from lora_jax.models.layers.placement import platform_of
from lora_jax.training.memory.ladder import RematChoice
from lora_jax.training.processes import write_json
from lora_jax.training.run.log import duration
from train.begin import begin_row, check_images, load_model, note_finished, open_run
from train.console.errors import flag
from train.console.output import tell
from train.dry_run import rehearse
from train.inputs import make_inputs
from train.options.common import Options
from train.plan.remat import settle_remat
from train.processes import hosts
from train.processes.cache import keep_compiled
from train.processes.mesh import make_mesh
from train.processes.session import Session
from train.remat import choose_remat_of
from train.run.intrinsic import merge_trained, model_in
from train.run.log import doing
from train.run.output import ADAPTER, REPORT
from train.run.report import (
    ask_words,
    note_seconds,
    print_adapter,
    print_commands,
    print_costs,
    tree_bytes,
    whole_time,
)
from train.run.rules import rules
from train.run.task import Task
from train.settings.table import TableRow
from train.steps import SharedModel, train_alone, train_beside
from train.table import RunPart, RunRequest, TableRun


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
    began, is_whole = time.monotonic(), part is None
    part = part or RunPart()
    hosts.join_hosts(config.run)
    console = hosts.console()
    session.join(console, config.run)
    if config.run.dry_run:
        return _show(config, task, session, part, console)
    request = RunRequest(TableRow(config.run.output, "", frozenset(), config), task)
    (row,) = train_rows(script, [request], session, console, part, alone=True)
    run, report = row.run, row.report
    if row.is_finished:
        done = (report or {})["last_step"]
        tell(
            console,
            f"{shown(run.folder)} is finished after step {done}, and nothing was changed. For "
            f"going on after step {done}, give more {flag('steps')} or {flag('patience')}",
        )
        return row.scores
    if run.pauses or report is None:
        tell(console, f"paused after step {run.last} of {run.steps}")
        return {}
    took = f"this part of the run took {duration(time.monotonic() - began)}"
    if part.is_prior:
        tell(console, took)
        return row.scores
    print_costs(console, report)
    tell(console, report["summary"])
    if is_whole:
        took = f"the whole run took {whole_time([run.folder], session)}"
    console.print(f"{took}; its files are in {shown(run.folder)}")
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
    table, chosen = _open_rows(script, requests, session, console, part, alone=alone)
    rows = [row for row in table if not row.is_finished]
    if not rows:
        return table

    # The model and its weights, which are read once.
    config, inputs = rows[0].run.config, rows[0].inputs
    outline, layout = inputs.read.outline, inputs.layout
    with hosts.raise_in_every_process(), doing(console, f"reading the weights of {outline.name}"):
        model, plain = load_model(config.optim, config.adapter, outline, layout)
    if not alone:
        tell(console, f"{len(rows)} runs train side by side over {outline.name}")
    # A model that recomputes its layers takes long rows by chunks, without a backward pass, too.
    answering = model.clone(remat=False) if layout.keeps_rows else model
    forward = lj.adapt(model_in(rows[0].space, answering).apply)
    base = SharedModel(model, outline, layout, tree_bytes(plain), forward)

    # The adapters, and the base for comparison.
    tenants: dict[str, Tenant] = {}
    for row in rows:
        with row.isolate_errors():
            if tenant := begin_row(row, model, plain, session.release):
                tenants[row.name] = tenant
            note_seconds(row.run.folder, session)
            session.release.callback(note_seconds, row.run.folder, session)
    for row in rows:
        if row.error is None and row.evaluation and not row.run.pauses:
            part.evaluate_base(row.evaluation, model, plain, base.evaluated)

    # Training. It leaves each adapter on its own, the loss curve, and a report of its costs.
    if alone:
        del plain
        train_alone(rows[0], base, chosen)
    else:
        train_beside(rows, tenants, plain, base, console, session)
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
    return table


def _open_rows(
    script: str,
    requests: Sequence[RunRequest],
    session: Session,
    console: Console,
    part: RunPart,
    *,
    alone: bool,
) -> tuple[list[TableRun], RematChoice | None]:
    """Opens the runs, and checks what can be checked before weights are read.

    That is, of all rows: options and output folder, then the data, then examples and targets
    against the model's configuration.

    Args:
      script, requests, session, console, part, alone: see `train_rows`.

    Returns:
      The runs, in order, and the choice of --remat auto.
    """
    with hosts.raise_in_every_process():
        run = requests[0].row.options.run
        cached = keep_compiled(run.compilation_cache)
        sizes = (request.row.options.optim.batch_size for request in requests)
        mesh = make_mesh(run.mesh, math.gcd(*sizes), slice_axis=run.slice_axis)
        own = console if alone else None
        rows = [open_run(script, request, mesh, session, part, own) for request in requests]
        for row in rows:
            note_finished(row, part)
        going = [row for row in rows if not row.is_finished]
        chosen = None
        if going:
            check_images(going)
            chosen = choose_remat_of(going)
    if cached:
        tell(console, cached)
    for row in going:
        tell(row.run.console, *row.inputs.lines)
    if not alone:
        tell(console, *(f"{row.name}: finished" for row in rows if row.is_finished))
    return rows, chosen


def _finish(
    row: TableRun, base: SharedModel, part: RunPart, console: Console, *, evaluates: bool
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
    if evaluates:
        write_json(run.folder / REPORT, row.report | {"scores": row.scores})
