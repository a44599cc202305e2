"""Begins runs: reads the weights of their model, and makes their adapters and first states."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import optax
from rich.console import Console

import lora_jax as lj
from lora_jax import subspace
from lora_jax.core.types import Model, Tree
from lora_jax.training.losses import HELD_OUT, SCORE
from lora_jax.training.optimizer import takes_from_base
from lora_jax.training.processes import is_first, wait_for_all
from lora_jax.training.ready import TrainingStart, make_start, resume_start
from lora_jax.training.run.best import BEST, Best
from lora_jax.training.run.checkpoints import Checkpoints
from train.adapters.source import find_adapter
from train.console.errors import as_user_errors, flag
from train.console.output import tell
from train.options.common import Options
from train.options.optim import make_optimizer, make_schedule, optimizer_line
from train.processes import hosts
from train.processes.session import Session
from train.reporters.files import read_json
from train.run import output
from train.run.costs import note_seconds, tree_bytes, versions
from train.run.intrinsic import model_in, moves_weights, space_of
from train.run.log import doing
from train.run.pretrained import check_weights, read_model
from train.run.rules import rules
from train.run.task import EvaluatedModel, ModelContext
from train.stages.arrangement import Arrangement
from train.stages.inputs import Inputs
from train.stages.open import evaluation_context, evaluation_of
from train.stages.types import (
    BegunRun,
    FailedRun,
    Handover,
    OpenedRun,
    RunContext,
    SharedModel,
)


def read_base(run: OpenedRun, console: Console) -> tuple[SharedModel, Handover[Tree]]:
    """Reads the model that runs share, once; returns it with its weights.

    Raises:
      UserError: the weights cannot be read, or do not fit the model.
    """
    outline, layout = run.inputs.read.outline, run.inputs.layout
    with hosts.raise_in_every_process(), doing(console, f"reading the weights of {outline.name}"):
        model, plain, _ = load_base(run.config, run.inputs)
    # A model that recomputes its layers takes long rows by chunks, without a backward pass, too.
    without_remat = model.clone(remat=False) if layout.keeps_rows else model
    shared = SharedModel(
        model=model,
        outline=outline,
        layout=layout,
        n_bytes=tree_bytes(plain),
        adapted_forward=lj.adapt(model_in(run.space, without_remat).apply),
    )
    return shared, Handover(plain)


def load_base(config: Options, inputs: Inputs) -> EvaluatedModel:
    """Reads the model and its weights, as the options say; returns them with plain weights.

    Full fine-tuning, and that of a subspace, keeps its weights in fp32, whatever computes.
    """
    optim = config.optim
    outline = inputs.read.outline
    model, params = read_model(
        outline.name,
        dtype=optim.dtype,
        param_dtype="float32" if moves_weights(config.adapter) else optim.dtype,
        remat=optim.remat_policy,
        attention=optim.attention,
        experts=optim.experts,
        sharding=inputs.layout.of_parameter,
        **outline.head,
    )
    check_weights(outline, params)
    # Codes stay codes, which the model runs on through `adapt` alone.
    forward = lj.adapt(model.apply) if outline.has_codes else model.apply
    return EvaluatedModel(model, params, forward)


def begin_runs(
    runs: Mapping[str, OpenedRun],
    base: SharedModel,
    weights: Handover[Tree],
    session: Session,
    arrangement: Arrangement,
    context: RunContext,
) -> dict[str, BegunRun | FailedRun]:
    """Begins runs over one base, and measures the base for them.

    Args:
      runs: the runs, by name.
      base: the model.
      weights: its parameters.
      session: is told how long this process works.
      arrangement: says how the runs stand beside each other.
      context: has the evaluations of the base so far.
    """
    base_params = weights.content
    begun_runs: dict[str, BegunRun | FailedRun] = {}
    for name, run in runs.items():
        work = functools.partial(begin_run, run, base.model, base_params, session, arrangement)
        begun_runs[name] = arrangement.attempt(run, work)
    # Plain weights run by the model itself; codes stay codes.
    forward = base.adapted_forward if base.outline.has_codes else base.model.apply
    for begun in begun_runs.values():
        if isinstance(begun, BegunRun) and begun.evaluation and not begun.opened.pauses:
            # What an earlier run measured of the same base is not measured again.
            is_measured = any(map(begun.evaluation.reuse_base_scores, context.measured))
            if not is_measured:
                begun.evaluation.before(EvaluatedModel(base.model, base_params, forward))
                context.measured.append(begun.evaluation)
    return begun_runs


def begin_run(
    run: OpenedRun, model: Model, plain: Tree, session: Session, arrangement: Arrangement
) -> BegunRun:
    """Adapts the base for a run that is opened, and makes its state, new or resumed.

    Args:
      run: the run.
      model: the model.
      plain: its parameters.
      session: is told how long this process works; closes the run's log in the end.
      arrangement: says how the run stands beside others.

    Raises:
      TrainingError: the checkpoint in the folder belongs to another run.
    """
    key = jax.random.key(run.config.optim.seed)
    params = adapt_base(run, plain, jax.random.fold_in(key, 0))
    params = run.inputs.layout.placed(params)
    start = begin_state(run, params, jax.random.fold_in(key, 1))
    context = ModelContext(
        **vars(evaluation_context(run)),
        layout=run.inputs.layout,
        model=model,
        plain=plain,
        ready=start,
        takes_from_base=takes_from_base(params),
    )
    start, data = run.task.prepare(context)
    inputs = dataclasses.replace(run.inputs, read=run.inputs.read._replace(data=data))
    opened = dataclasses.replace(run, inputs=inputs)
    arrangement.keep_log(opened, session.release)
    state = jax.eval_shape(lambda: start.state)
    begun = BegunRun(
        opened=opened,
        evaluation=evaluation_of(opened),
        best=start.best,
        batch=start.feed.first(),
        start=Handover(dataclasses.replace(start, state=state)),
        arrays=Handover(arrangement.arrays(opened, start, params)),
    )
    note_seconds(run.folder, session)
    session.release.callback(note_seconds, run.folder, session)
    return begun


def adapt_base(run: OpenedRun, plain: Tree, key: jax.Array) -> Tree:
    """Returns the parameters with --init-adapter's adapter, a resumed run's first, or a new one.

    With --intrinsic, the numbers of the subspace stand beside them.
    """
    config = run.config
    outline = run.inputs.read.outline
    space = space_of(config, plain)
    if space is not None:
        return subspace.tree_of(space, plain)
    allow_mismatch = config.adapter.allow_base_mismatch
    if config.adapter.init_adapter is not None:
        source = find_adapter(config.adapter.init_adapter, "--init-adapter")
        return source.load(outline, plain, outline.name, allow_base_mismatch=allow_mismatch)
    start_adapter = run.folder / output.START
    with as_user_errors(ValueError):
        if config.run.resume and start_adapter.exists():
            return lj.load_adapter(start_adapter, plain, allow_base_mismatch=allow_mismatch)
        adapter_rules = rules(config.adapter, outline)
        return lj.lorafy(plain, adapter_rules, key=key, kinds=outline.kinds)


def begin_state(run: OpenedRun, params: Tree, key: jax.Array) -> TrainingStart:
    """Returns the state to train from, new or resumed, and writes the run's configuration.

    Args:
      run: the run.
      params: the adapted tree.
      key: random key of dropout.

    Raises:
      TrainingError: the checkpoint in the folder belongs to another run.
    """
    optim, inputs = run.config.optim, run.inputs
    summary = lj.summary(params, in_training=True)
    params = inputs.layout.placed(params)
    tell(run.console, summary, optimizer_line(optim, params))
    schedule = make_schedule(optim, inputs.rate, inputs.steps)
    start = make_start(
        params,
        inputs.feed,
        layout=inputs.layout,
        optimizer=make_optimizer(optim, schedule, params),
        schedule=schedule,
        key=key,
        checkpoints=Checkpoints(
            run.folder / output.CHECKPOINTS,
            run.config.run.keep,
            before_record=run.place.send,
            notice=functools.partial(tell, run.console),
        ),
        best=_best(run),
        noise=optim.neftune,
    )
    if space := run.about.get(subspace.FACTS):
        start = dataclasses.replace(start, facts=start.facts | {"settings": {"subspace": space}})
    if run.config.run.resume:
        start = resume_start(start, inputs.steps)
        done = int(start.state.step)
        text = f"going on after step {done}" if done else "no checkpoint yet: beginning at step 0"
        tell(run.console, text, *_moved(run, schedule, done))
    _write_settings(run, summary)
    if takes_from_base(params) and not (run.folder / output.START).exists():
        # So that --resume decomposes nothing again.
        lj.save_adapter(run.folder / output.START, params, about=run.about)
    return start


def _write_settings(run: OpenedRun, summary: str) -> None:
    """Writes the options and the facts of a run, and clears what an earlier run left."""
    inputs = run.inputs
    facts = inputs.read.data.facts
    # Of packed rows, an example of the feed is a sequence of several.
    n_rows = facts.get("rows", inputs.feed.n_examples)
    resolved = {"steps": inputs.steps, "examples": n_rows, "lr": inputs.rate}
    facts = {"resolved": resolved, **facts, "summary": summary, "versions": versions()}
    wait_for_all("the options of all processes are checked")
    if is_first():
        output.begin(run.place, run.config, run.script, facts)
    else:
        output.clear_copy(run.folder, run.config)
    wait_for_all("the run has begun")


def _moved(run: OpenedRun, schedule: optax.Schedule, done: int) -> tuple[str, ...]:
    """Returns a line of warning if a new number of steps changes the learning rate from here on."""
    began = read_json(run.folder / output.FACTS).get("resolved", {})
    optim, steps = run.config.optim, run.inputs.steps
    if not done or not {"steps", "lr"} <= began.keys():
        return ()
    was = make_schedule(optim, began["lr"], began["steps"])
    here, there = float(was(done)), float(schedule(done))
    if began["steps"] == steps or math.isclose(here, there, rel_tol=1e-6):
        return ()
    return (
        f"warning: the run began with {began['steps']} steps and now has {steps}, so its "
        f"{optim.schedule} schedule is another one: the learning rate goes on at {there:.2e}, not "
        f"at {here:.2e}. To go on without this jump, give {flag('steps', began['steps'])}; for a "
        "length that may change, begin a run with --schedule constant or wsd",
    )


def _best(run: OpenedRun) -> Best | None:
    """Returns the keeper of the best adapter; None without --keep-best."""
    asked = run.config.run
    if asked.keep_best is None:
        return None
    is_loss = asked.keep_best == "loss"
    return Best(
        run.folder / BEST,
        f"{HELD_OUT}loss" if is_loss else f"{SCORE}{run.task.score}",
        goal="min" if is_loss else "max",
        patience=asked.patience,
        about=run.about,
    )
