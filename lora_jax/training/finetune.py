"""Fine-tuning from Python: takes a model, examples and rules; returns a trained tree and a report.

It runs the same loop and step as the scripts, which add options, a progress bar and TensorBoard.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from lora_jax import models
from lora_jax.core.opaque import wrap_opaque_leaves
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.types import Forward, Model, Tree
from lora_jax.core.weight import is_node
from lora_jax.training import arguments
from lora_jax.training.data.batches import Examples
from lora_jax.training.errors import TrainingError, as_argument
from lora_jax.training.held_out import held_out_loss
from lora_jax.training.layout import Layout, layout_of_one_device
from lora_jax.training.loop import Pace, train
from lora_jax.training.losses import HELD_OUT, Loss, Sums
from lora_jax.training.optimizer import takes_from_base
from lora_jax.training.optimizers.schedules import ScheduleKind
from lora_jax.training.processes import is_first, wait_for_all
from lora_jax.training.ready import (
    TrainingStart,
    compile_step,
    final_tree,
    make_hooks,
    make_start,
    open_log,
    resume_start,
)
from lora_jax.training.run.best import BEST, Best
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.run.lock import FolderLock, RunLock
from lora_jax.training.run.log import Line, Recorder, show
from lora_jax.training.run.stop import Stop

_LIBRARY_MODELS = (
    models.Decoder,
    models.GPT2,
    models.Encoder,
    models.VisionEncoder,
    models.SmolVLM,
    models.QwenVL,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The results of a run.

    Attributes:
      summary: the trainable parameters, in words; see `lora_jax.summary`.
      steps: the run's number of steps, those before it was resumed included. It may have ended
        earlier, by `patience`.
      metrics: the lines of metrics, as they were logged.
      held_out: the last measurement on held-out examples, by name; {} for none.
      compile_seconds: seconds of compiling the step.
      step_seconds: seconds of a step, the median; None where none was taken.
      adapter: the saved adapter; None without a folder.
      best: the step and the held-out loss of the best adapter; None where it was not asked for.
    """

    summary: str
    steps: int
    metrics: tuple[Line, ...]
    held_out: dict[str, float]
    compile_seconds: float
    step_seconds: float | None
    adapter: Path | None
    best: dict[str, Any] | None = None


def finetune(
    model: Model | Forward,
    params: Tree,
    examples: Examples | Mapping[str, Any],
    rules: Sequence[lj.LoraRule | lj.TrainRule] | None = None,
    *,
    lr: float | optax.Schedule,
    loss: Loss | Callable[..., Sums] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    grad_accum: int = 1,
    schedule: ScheduleKind = "cosine",
    warmup: int = 3,
    weight_decay: float = 0.0,
    optimizer: str | optax.GradientTransformation = "adamw",
    held_out: Examples | Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log: Callable[[Line], object] | None = show,
    log_every: int | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    keep: int = 2,
    keep_best: bool = False,
    patience: int | None = None,
    max_skipped: int = 3,
    seed: int = 0,
    layout: Layout | None = None,
) -> tuple[Tree, Report]:
    """Fine-tunes a model.

    With a folder, the adapter is saved in ``folder/adapter`` at the end, and checkpoints on the
    way; Ctrl-C then ends the run after the step in progress, and it goes on by ``resume=True``.

    Args:
      model: one of `lora_jax.models`, a Flax module, or any function of a tree of parameters.
      params: the tree, plain; or adapted already, where `rules` is None.
      examples: `chats`, `texts`, `images`, or a user's own arrays by name, each [n, …].
      rules: say what trains.
      lr: the highest learning rate (see `lora_jax.optim.learning_rate`), or a schedule.
      loss: the function to minimise, a `Loss` or its `sums`. Chats, texts and images have one; own
        arrays need one. It is called as ``loss(forward, params, batch, dropout_key)``, where
        ``forward`` is the adapted `model` (of a module, its ``apply``).
      steps, epochs: the length of the run: give one of the two; by default one epoch.
      batch_size: examples in memory at once.
      grad_accum: batches a step.
      schedule: how `lr` falls after the warmup; see `warmed_up`.
      warmup: steps over which `lr` rises.
      weight_decay: weight decay of A, B, kernels and embeddings.
      optimizer: a name that `make_optimizer` takes, or one of your own; `lr` is then its schedule,
        to be logged.
      held_out: examples like `examples`, to measure the loss on.
      folder: where to keep adapter and checkpoints.
      resume: goes on from the last checkpoint in the folder; begins where there is none.
      overwrite: deletes the run that the folder holds.
      log: gets each line of metrics, a dict; None keeps quiet.
      log_every, eval_every, save_every: steps between lines, measurements on held-out examples,
        and checkpoints; by default ten a run of each.
      keep: the number of checkpoints that are kept.
      keep_best: returns and saves the adapter with the least held-out loss, not the last one; on
        the way, it is kept in ``folder/best``.
      patience: ends the run after so many measurements in a row without a better one.
      max_skipped: a step whose loss or gradient is not finite is skipped; after so many in a row
        the run ends. A step whose batch has no token that counts is skipped, too, but does not
        count.
      seed: seed of the adapter's start, the order of the examples, and dropout.
      layout: the mesh, and the sharding of everything on it; by default one device.

    Returns:
      The trained tree, adapted (see `lora_jax.merge`, `lora_jax.save_adapter`), and a report.

    Raises:
      TrainingError: an argument makes no sense, or the folder holds another run.
      Diverged: too many steps in a row were skipped.
      Interrupted: after a signal, once the step is finished and saved.
      ValueError: the rules do not fit the tree.

    >>> from lora_jax import training
    >>> def squares(forward, params, batch, dropout_key):
    ...     error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2)
    ...     return training.Sums(error, jnp.float32(len(batch["x"])), {})
    >>> def model(params, x):
    ...     return x @ params["kernel"]
    >>> x = jax.random.normal(jax.random.key(0), (16, 4))
    >>> params = {"kernel": jnp.zeros((4, 3))}
    >>> rules = [lj.LoraRule(targets=["kernel"], rank=2)]
    >>> examples = {"x": x, "y": x[:, :3]}
    >>> tuned, report = training.finetune(
    ...     model, params, examples, rules, loss=squares, lr=1e-2, steps=2, log=None
    ... )
    >>> report.summary
    'trainable params: 14 || all params: 26 || trainable%: 53.8462'
    """
    argument_values = {**locals()}  # by name
    if isinstance(rules, Iterator):  # its rules are settings of the run as well
        rules = list(rules)
    job = arguments.check_job(
        argument_values,
        arguments.Subject(
            model=model,
            examples=examples,
            rules=rules,
            loss=loss,
            layout=layout or layout_of_one_device(),
        ),
        arguments.LengthOptions(
            steps=steps, epochs=epochs, batch_size=batch_size, grad_accum=grad_accum
        ),
        arguments.RateOptions(
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            optimizer=optimizer,
        ),
        arguments.FolderOptions(name=folder, resume=resume, overwrite=overwrite, keep=keep),
        arguments.IntervalOptions(
            log_every=log_every,
            eval_every=eval_every,
            save_every=save_every,
            max_skipped=max_skipped,
        ),
        arguments.HeldOutOptions(examples=held_out, keep=keep_best, patience=patience),
        seed,
    )
    with contextlib.ExitStack() as run_lock:
        if job.path is not None and is_first():
            run_lock.enter_context(RunLock(FolderLock(job.path)))
            arguments.check_folder(job.path, resume, overwrite)  # another run may just have ended
        start, summary, start_folder = _prepare_run(job, params)
        del params
        return _train_to_end(job, start, summary, start_folder, Recorder(log))


class _PreparedRun(NamedTuple):
    """The prepared parts of a run before its first step.

    Attributes:
      start: the first state, or that of the last checkpoint.
      summary: the trainable parameters, in words.
      start_folder: where to save the first adapter, if it took factors out of the base and is not
        saved yet; else None.
    """

    start: TrainingStart
    summary: str
    start_folder: Path | None


def _prepare_run(job: arguments.FinetuneJob, params: Tree) -> _PreparedRun:
    """Prepares a run: the initial state, or the state of the last checkpoint."""
    path, folder = job.path, job.folder
    model, rules, layout = job.subject.model, job.subject.rules, job.subject.layout
    key = jax.random.key(job.seed)
    start_folder = None if path is None else path / arguments.START
    has_start = start_folder is not None and folder.resume and start_folder.exists()
    kinds = models.kinds(model.config) if isinstance(model, _LIBRARY_MODELS) else None
    params = _adapt_params(
        params, rules, kinds, jax.random.fold_in(key, 0), start_folder if has_start else None
    )
    params = layout.placed(wrap_opaque_leaves(params))
    checkpoints = None
    best = None
    if path is not None:
        checkpoints = Checkpoints(path / arguments.CHECKPOINTS, folder.keep)
        if job.best.keep:
            best = Best(path / BEST, f"{HELD_OUT}loss", patience=job.best.patience)
    schedule = job.rate.rates(job.steps)
    start = make_start(
        params,
        job.feed,
        layout=layout,
        optimizer=job.rate.transformation(schedule, params),
        schedule=schedule,
        key=jax.random.fold_in(key, 1),
        checkpoints=checkpoints,
        best=best,
    )
    start = dataclasses.replace(start, facts={**start.facts, "settings": job.settings()})
    if folder.resume:
        start = resume_start(start, job.steps)
    elif folder.overwrite and path is not None:
        if is_first():
            arguments.delete_run_files(path)
        wait_for_all("the folder is cleared")
    if has_start or rules is None or not takes_from_base(params):
        start_folder = None
    return _PreparedRun(start, lj.summary(params, in_training=True), start_folder)


def _train_to_end(
    job: arguments.FinetuneJob,
    start: TrainingStart,
    summary: str,
    start_folder: Path | None,
    recorder: Recorder,
) -> tuple[Tree, Report]:
    """Trains a run to its end, saves its adapter, and returns the tree and the report."""
    path, loss = job.path, job.loss
    compile_start = time.perf_counter()
    forward = _adapt_forward(job.subject.model, start)
    step = compile_step(start, forward, loss)
    compile_seconds = time.perf_counter() - compile_start
    if start_folder is not None:  # so that a resumed run decomposes nothing again
        lj.save_adapter(start_folder, lj.join(start.state.adapter, start.base))
    tenth = max(1, job.steps // 10)
    pace = Pace(
        log_every=job.intervals.log_every or tenth,
        save_every=job.steps if path is None else job.intervals.save_every or tenth,
        max_skipped=job.intervals.max_skipped,
    )
    stop = Stop()
    measures = []
    if job.measured is not None:
        every = job.intervals.eval_every or tenth
        measures = [held_out_loss(start, forward, loss, job.measured, every=every, stop=stop)]
    resume_hint = f"Continue with {as_argument('resume', True)}"
    stop.remedy = resume_hint
    # Only the main thread gets signals.
    is_main_thread = threading.current_thread() is threading.main_thread()
    with stop.listening() if path is not None and is_main_thread else contextlib.nullcontext():
        hooks = make_hooks(start, loss, measures, resume_hint)
        with open_log(recorder, start):
            state, step_times = train(
                step, start.state, start.base, job.steps, pace, hooks, recorder, stop
            )
    trained = final_tree(start, state)
    if path is not None:
        lj.save_adapter(path / arguments.ADAPTER, trained, overwrite=True)
        stop.remedy = f"The adapter is in {path / arguments.ADAPTER}"
        stop.check()  # a signal in the last step
    held_out_line: Line = {}
    for line in recorder.lines:
        if f"{HELD_OUT}loss" in line:
            held_out_line = line
    held_out = {
        name.removeprefix(HELD_OUT): value
        for name, value in held_out_line.items()
        if name != "step"
    }
    return trained, Report(
        summary=summary,
        steps=job.steps,
        metrics=tuple(recorder.lines),
        held_out=held_out,
        compile_seconds=compile_seconds,
        step_seconds=None if step_times is None else step_times.median,
        adapter=None if path is None else path / arguments.ADAPTER,
        best=None if start.best is None else start.best.about,
    )


def _adapt_params(
    params: Tree, rules: Any, kinds: Any, key: jax.Array, start_folder: Path | None
) -> Tree:
    """Returns the adapted tree, with its own copies of the trained arrays.

    Args:
      params: plain, or adapted where `rules` is None.
      rules: say what trains.
      kinds: kinds of the parameters, for presets of targets; None for a model of the user's own.
      key: PRNG key of the adapter's start.
      start_folder: the saved adapter that the run began with, if it took factors out of the base.
    """
    if rules is not None:
        if start_folder is not None:
            return lj.load_adapter(start_folder, params)
        return lj.lorafy(params, rules, key=key, kinds=kinds)
    leaves, _ = flatten_with_paths(params, is_leaf=is_node)
    if not any(is_node(leaf) for _, leaf in leaves):
        raise TrainingError(
            "rules is missing, and params has no adapter, so nothing would train. Pass rules, such "
            "as "
            '[lora_jax.LoraRule(targets="all-linear", rank=8)], or an adapted tree.'
        )
    adapter, base = lj.split(params)
    return lj.join(jax.tree.map(jnp.copy, adapter), base)  # the step donates them


def _adapt_forward(model: Any, ready: TrainingStart) -> Forward:
    """Returns the adapted function for the loss.

    A model of the library has its activations placed on the mesh.
    """
    if hasattr(model, "placement"):
        return ready.setup.forward(model)
    return lj.adapt(getattr(model, "apply", model))
