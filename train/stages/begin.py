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
from lora_jax.quantized import without_rows_kernel
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
    """Reads the model that runs share and returns it with its weights.

    Raises:
      UserError: the weights cannot be read, or do not fit the model.
    """
    outline, layout = run.inputs.read.outline, run.inputs.layout
    with hosts.raise_in_every_process(), doing(console, f"reading the weights of {outline.name}"):
        model, plain, _ = load_base(run.config, run.inputs)
    # Evaluation needs no recomputed layers, and a model with them would split long rows in chunks.
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
    """Reads the model and its plain weights in the dtypes of the options.

    Full fine-tuning and training in a subspace keep the weights in float32 for every --dtype.
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
    if optim.few_rows == "xla":
        params = without_rows_kernel(params)
    # A model runs on quantized weights only through `adapt`.
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
    """Begins runs over one base, and evaluates the base for them.

    Args:
      runs: the runs, by name.
      base: the model.
      weights: the model's parameters.
      session: records the time of this process.
      arrangement: the arrangement of the runs.
      context: contains the evaluations of the base so far.
    """
    base_params = weights.content
    begun_runs: dict[str, BegunRun | FailedRun] = {}
    for name, run in runs.items():
        work = functools.partial(begin_run, run, base.model, base_params, session, arrangement)
        begun_runs[name] = arrangement.attempt(run, work)
    # A model runs on quantized weights only through `adapt`.
    forward = base.adapted_forward if base.outline.has_codes else base.model.apply
    for begun in begun_runs.values():
        if not isinstance(begun, BegunRun) or begun.evaluation is None or begun.opened.pauses:
            continue
        evaluation = begun.evaluation
        # Scores of the same base from an earlier run are reused.
        is_measured = any(map(evaluation.reuse_base_scores, context.measured))
        if not is_measured:
            evaluation.before(EvaluatedModel(base.model, base_params, forward))
            context.measured.append(evaluation)
    return begun_runs


def begin_run(
    run: OpenedRun, model: Model, plain: Tree, session: Session, arrangement: Arrangement
) -> BegunRun:
    """Adapts the base for an opened run, and makes the run's new or resumed state.

    Args:
      run: the run.
      model: the model.
      plain: the model's parameters.
      session: records the time of this process, and closes the run's log at the end.
      arrangement: the arrangement of the runs.

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
    # The task may change the data, for example add the reference's log-probabilities.
    start, data = run.task.prepare(context)
    inputs = dataclasses.replace(run.inputs, read=run.inputs.read._replace(data=data))
    opened = dataclasses.replace(run, inputs=inputs)
    arrangement.keep_log(opened, session.release)
    # The start keeps shapes only, because the first step donates the arrays.
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
    """Returns the base with the adapter of --init-adapter, of a resumed run's start, or a new one.

    With --intrinsic, returns the base with the trained numbers of the subspace.
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
    """Returns the new or resumed state to train from, and writes the run's configuration.

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
        best=_make_best(run),
        noise=optim.neftune,
    )
    space = run.about.get(subspace.FACTS)
    if space:
        start = dataclasses.replace(start, facts=start.facts | {"settings": {"subspace": space}})
    if run.config.run.resume:
        start = resume_start(start, inputs.steps)
        done = int(start.state.step)
        text = "there is no checkpoint yet, so training starts at step 0"
        if done:
            text = f"training continues after step {done}"
        tell(run.console, text, *_rate_jump_warning(run, schedule, done))
    _write_settings(run, summary)
    # A factor that was computed from the base is saved, so that --resume need not compute it again.
    if takes_from_base(params) and not (run.folder / output.START).exists():
        lj.save_adapter(run.folder / output.START, params, about=run.about)
    return start


def _write_settings(run: OpenedRun, summary: str) -> None:
    """Writes the options and the facts of a run, and removes the files of an earlier run."""
    inputs = run.inputs
    facts = inputs.read.data.facts
    # With packing, an example of the feed is a sequence of several rows.
    n_rows = facts.get("rows", inputs.feed.n_examples)
    resolved = {"steps": inputs.steps, "examples": n_rows, "lr": inputs.rate}
    facts = {"resolved": resolved, **facts, "summary": summary, "versions": versions()}
    wait_for_all("the options of all processes are checked")
    if is_first():
        output.begin(run.place, run.config, run.script, facts)
    else:
        output.clear_copy(run.folder, run.config)
    wait_for_all("the run has begun")


def _rate_jump_warning(run: OpenedRun, schedule: optax.Schedule, done: int) -> tuple[str, ...]:
    """Returns a warning if a new number of steps changes the learning rate after `done` steps."""
    first_facts = read_json(run.folder / output.FACTS).get("resolved", {})
    optim = run.config.optim
    steps = run.inputs.steps
    # A run without a step so far, or of a version that saved no rate.
    if not done or not {"steps", "lr"} <= first_facts.keys():
        return ()
    first_steps = first_facts["steps"]
    first_schedule = make_schedule(optim, first_facts["lr"], first_steps)
    old_rate = float(first_schedule(done))
    new_rate = float(schedule(done))
    if first_steps == steps or math.isclose(old_rate, new_rate, rel_tol=1e-6):
        return ()
    return (
        f"warning: the run began with {first_steps} steps and now has {steps}, which changes its "
        f"{optim.schedule} schedule. The learning rate jumps from {old_rate:.2e} to "
        f"{new_rate:.2e}. To avoid the jump, pass {flag('steps', first_steps)}. If the length may "
        "change, start a run with --schedule constant or wsd.",
    )


def _make_best(run: OpenedRun) -> Best | None:
    """Returns the object that keeps the best adapter; None without --keep-best."""
    options = run.config.run
    if options.keep_best is None:
        return None
    is_loss = options.keep_best == "loss"
    return Best(
        run.folder / BEST,
        f"{HELD_OUT}loss" if is_loss else f"{SCORE}{run.task.score}",
        goal="min" if is_loss else "max",
        patience=options.patience,
        about=run.about,
    )
