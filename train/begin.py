"""The beginning of a run: its options and folder, the weights of its model, and its adapter."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

import jax
from jax.sharding import Mesh
from rich.console import Console

from lora_jax.bank.together.tenants import Tenant
from lora_jax.core.types import Model, Tree
from lora_jax.models.layers.placement import platform_of
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import Layout
from lora_jax.training.optimizer import takes_from_base
from lora_jax.training.processes import is_first
from train.console.errors import UserError, as_user_errors
from train.inputs import RunData, make_inputs
from train.options.common import AdapterConfig, OptimConfig
from train.options.optim import make_tenant
from train.plan.remat import settle_remat
from train.processes import hosts
from train.processes.session import Session
from train.reporters.files import ERROR, read_json
from train.reporters.registry import check_packages
from train.run.board import BufferedConsole
from train.run.intrinsic import about_space, moves_weights, space_of
from train.run.lifecycle import Run, adapt_base, begin_run, is_finished, resume_hint
from train.run.output import REPORT, locked_output
from train.run.pretrained import ModelInfo, check_weights, read_model
from train.run.rules import rules
from train.run.task import Evaluation, EvaluationContext, ModelContext
from train.table import RunPart, RunRequest, TableRun


def open_run(
    script: str,
    request: RunRequest,
    mesh: Mesh,
    session: Session,
    part: RunPart,
    console: Console | None,
) -> TableRun:
    """Returns a run, its options checked, its folder locked and its rows read.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      request: its row and its task.
      mesh: the devices.
      session: tells of signals, and releases the lock in the end.
      part: how far it trains, and the rows that are read already.
      console: the console of a single run; None for one of its own, beside other runs.

    Raises:
      TrainingError: something that was asked for cannot be done; names the row of a table.
    """
    (name, where, _, options), task = request
    place_of_row = as_user_errors(TrainingError, prefix=f"{where}: ") if where else nullcontext()
    with place_of_row:
        config, buffer = task.completed(options), BufferedConsole()
        config = settle_remat(config, platform_of(mesh.devices.flat[0]))
        own = console or buffer.console
        if is_first():
            check_packages(config.run.report_to)
        rules(config.adapter)
        place = locked_output(config, session.release, own)
        read = part.reader(config, task)
        session.release.callback(read.data.close)
        inputs = make_inputs(config, mesh, read)
        space = space_of(config, read.outline.params)
        kept = {k: v for k, v in read.data.facts.items() if k in ("labels", "seq_len")}
        run = Run(
            script=script,
            config=config,
            place=place,
            console=own,
            stop=session.stop,
            feed=inputs.feed,
            steps=inputs.steps,
            last=inputs.steps if part.until is None else part.until(inputs.steps, config),
            rate=inputs.rate,
            layout=inputs.layout,
            about=read.outline.about | about_space(space) | kept,
            hint=part.hint or resume_hint(script),
            score=task.score,
            watched={**task.watched, **read.data.watched},
        )
        loss = task.loss(config, inputs.layout)
    return TableRun(
        name=name,
        task=task,
        run=run,
        inputs=inputs,
        loss=loss,
        space=space,
        buffer=None if console else buffer,
    )


def load_model(
    optim: OptimConfig, adapter: AdapterConfig, outline: ModelInfo, layout: Layout
) -> tuple[Model, Tree]:
    """Reads the model and its weights, as the options say.

    Full fine-tuning, and that of a subspace, keeps its weights in fp32, whatever computes.
    """
    model, plain = read_model(
        outline.name,
        dtype=optim.dtype,
        param_dtype="float32" if moves_weights(adapter) else optim.dtype,
        remat=optim.remat_policy,
        attention=optim.attention,
        experts=optim.experts,
        sharding=layout.of_parameter,
        **outline.head,
    )
    check_weights(outline, plain)
    return model, plain


def begin_row(row: TableRun, model: Model, plain: Tree, held: ExitStack) -> Tenant | None:
    """Adapts the base for a run, new or resumed, whose evaluation and state it then has.

    Args:
      row: the run.
      model: the model.
      plain: its parameters.
      held: closes the run's log in the end.

    Returns:
      What trains beside other runs; None of a single run.
    """
    run, optim, (rows, outline, data) = row.run, row.run.config.optim, row.inputs.read
    key = jax.random.key(optim.seed)
    params = adapt_base(run.config, outline, plain, run.folder, jax.random.fold_in(key, 0))
    params = run.layout.placed(params)
    start = begin_run(run, params, jax.random.fold_in(key, 1), data.facts)
    preparing = ModelContext(
        config=run.config,
        folder=run.folder,
        console=run.console,
        outline=outline,
        data=data,
        stop=run.stop,
        layout=run.layout,
        model=model,
        plain=plain,
        ready=start,
        takes_from_base=takes_from_base(params),
    )
    start, data = row.task.prepare(preparing)
    row.inputs = dataclasses.replace(row.inputs, read=RunData(rows, outline, data))
    if row.buffer:
        row.buffer.keep_in(run.folder, held)
        (run.folder / ERROR).unlink(missing_ok=True)
    row.evaluation = evaluation_of(row)
    row.start, row.best = start, start.best
    if row.is_alone:
        return None
    row.drop_state()
    tenant = make_tenant(
        optim, params, start.setup.schedule, run.steps, loss=row.loss, key=start.state.key
    )
    # A new state is made in its slot, where alone it takes memory.
    return dataclasses.replace(tenant, state=start.state) if int(start.state.step) else tenant


def evaluation_of(row: TableRun) -> Evaluation | None:
    """Returns the evaluation of a run; None for none."""
    run, (rows, outline, data) = row.run, row.inputs.read
    context = EvaluationContext(
        config=run.config,
        folder=run.folder,
        console=run.console,
        rows=rows,
        data=data,
        outline=outline,
        stop=run.stop,
    )
    return row.task.evaluation(context)


def note_finished(row: TableRun, part: RunPart) -> None:
    """Notes whether a resumed run is finished, with its report and its scores.

    A run without scores that has an evaluation goes on, and so does one whose tree
    `part.on_trained` gets.
    """
    if part.on_trained is not None:
        return
    finished = hosts.map_over_processes(lambda _: is_finished(row.run), range(jax.process_count()))
    report = read_json(row.run.folder / REPORT)
    if all(finished) and (report["scores"] or evaluation_of(row) is None):
        row.is_finished, row.report, row.scores = True, report, report["scores"]


def check_images(rows: Sequence[TableRun]) -> None:
    """Raises a UserError where the rows of some runs hold images, and those of others none."""
    having = [getattr(row.inputs.read.data.train, "further", None) is not None for row in rows]
    if len({*having}) > 1:
        raise UserError(
            f"the rows of {rows[having.index(True)].name} have images, and those of "
            f"{rows[having.index(False)].name} have none, and they train side by side: "
            "give each kind a table of its own"
        )
