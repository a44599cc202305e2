"""Training from Python: a model, examples and rules in, a trained tree and a report out.

It is the loop of the scripts over the step of the scripts; what is missing here (options, a
progress bar, TensorBoard) they add.
"""

import contextlib
import dataclasses
import functools
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax import models
from lora_jax.paths import flatten_with_paths
from lora_jax.training.batches import Arrays, Examples, Packs
from lora_jax.training.checkpoints import RECORD, Checkpoints
from lora_jax.training.data.labelled import Labelled, classification_loss
from lora_jax.training.data.order import Feed, Order
from lora_jax.training.errors import TrainingError, as_argument
from lora_jax.training.fit import (
    Ready,
    check_positions,
    compile_step,
    fit,
    make_ready,
    resumed,
    settings_of,
)
from lora_jax.training.layout import Layout, one_device
from lora_jax.training.lock import FolderLock
from lora_jax.training.log import Line, Recorder, show
from lora_jax.training.losses import HELD_OUT, Loss, summed_loss
from lora_jax.training.optimizer import make_optimizer, takes_from_base
from lora_jax.training.optimizers.schedules import ScheduleKind, warmed_up
from lora_jax.training.processes import is_first, wait_for_all
from lora_jax.training.stop import Stop
from lora_jax.weight import is_node

ADAPTER, START, CHECKPOINTS = "adapter", "start", "checkpoints"
_OURS = (ADAPTER, START, CHECKPOINTS, RECORD)
_OUR_MODELS = (models.Decoder, models.GPT2, models.Encoder)
_CHUNK = 256  # predictions whose logits exist at once, for each part of a batch on a mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Says what a run did.

    Attributes:
      summary: the trainable parameters, in words; see `lora_jax.summary`.
      steps: the steps that the run has, those before it was resumed among them.
      metrics: the lines of metrics, as they were logged.
      held_out: the last measurement on held-out examples, by name; {} for none.
      compile_seconds, step_seconds: of the step; the median, None where none was taken.
      adapter: the saved adapter; None without a folder.
    """

    summary: str
    steps: int
    metrics: tuple[Line, ...]
    held_out: dict[str, float]
    compile_seconds: float
    step_seconds: float | None
    adapter: Path | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pace:
    log_every: int
    save_every: int
    eval_every: int
    max_skipped: int


def finetune(
    model: Any,
    params: Any,
    examples: Examples | Mapping[str, Any],
    rules: Sequence[lj.LoraRule | lj.TrainRule] | None = None,
    *,
    lr: float | optax.Schedule,
    loss: Loss | Callable[..., Any] | None = None,
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
    max_skipped: int = 3,
    seed: int = 0,
    layout: Layout | None = None,
) -> tuple[Any, Report]:
    """Fine-tunes a model.

    With a folder, the adapter is saved in ``folder/adapter`` at the end, and checkpoints on the
    way; Ctrl-C then ends the run after the step in progress, and it goes on by ``resume=True``.

    Args:
      model: one of `lora_jax.models`, a Flax module, or any function of a tree of parameters.
      params: the tree, plain; or adapted already, where `rules` is None.
      examples: `chats`, `texts`, or a user's own arrays by name, each [n, …].
      rules: say what trains.
      lr: the highest learning rate (see `lora_jax.optim.learning_rate`), or a schedule.
      loss: the function to minimise, a `Loss` or its `sums`. Chats and texts have one; own arrays
        need one. It is called as ``loss(forward, params, batch, dropout_key)``, where ``forward``
        is the adapted `model` (of a module, its ``apply``).
      steps, epochs: the length of the run, in one of the two; by default one epoch.
      batch_size: examples in memory at once.
      grad_accum: batches a step.
      schedule: how `lr` falls after the warmup; see `warmed_up`.
      warmup: steps over which `lr` rises.
      weight_decay: of A, B and kernels.
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
      max_skipped: a step whose loss or gradient is not finite is skipped; after so many in a row
        the run ends.
      seed: of the adapter's start, the order of the examples, and dropout.
      layout: the devices, and where everything lies on them; by default one device.

    Returns:
      The trained tree, adapted (see `lora_jax.merge`, `lora_jax.save_adapter`), and a report.

    Raises:
      TrainingError: something that is asked for makes no sense, or the folder is another run's.
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
    # What can be wrong is found first.
    examples = _as_examples(examples, "examples")
    measured = None if held_out is None else _like(_as_examples(held_out, "held_out"), examples)
    _check_length(steps, epochs)
    _check_counts(batch_size=batch_size, grad_accum=grad_accum, steps=steps, keep=keep)
    _check_counts(log_every=log_every, eval_every=eval_every, save_every=save_every)
    _check_counts(max_skipped=max_skipped)
    if not callable(lr) and not (math.isfinite(lr) and lr > 0):
        raise TrainingError(f"lr={lr}: a learning rate is a positive number")
    if not 0 <= seed < 2**32:
        raise TrainingError(f"seed={seed}: a number from 0 to {2**32 - 1} is needed")
    layout = layout or one_device()
    for rows in (examples, *([] if measured is None else [measured])):
        check_positions(model, rows)
    loss = _loss_of(loss, examples, layout)
    order = Order.of(examples, seed, batch_size, grad_accum)
    steps = steps or order.steps(epochs or 1)
    path = _check_folder(folder, resume, overwrite)

    with contextlib.ExitStack() as held:
        if path is not None and is_first():
            held.enter_context(FolderLock(path))
            _check_folder(path, resume, overwrite)  # another run may just have ended

        # The adapted tree and the state before the first step, or after the last checkpoint.
        rate = lr if callable(lr) else warmed_up(lr, steps, kind=schedule, warmup=warmup)
        key = jax.random.key(seed)
        first = path / START if path is not None and resume and (path / START).exists() else None
        kinds = models.kinds(model.config) if isinstance(model, _OUR_MODELS) else None
        params = layout.placed(_adapted(params, rules, kinds, jax.random.fold_in(key, 0), first))
        ready = make_ready(
            params,
            Feed(examples, order, examples.name),
            layout=layout,
            optimizer=make_optimizer(optimizer, rate, params, weight_decay=weight_decay)
            if isinstance(optimizer, str)
            else optimizer,
            schedule=rate,
            key=jax.random.fold_in(key, 1),
            checkpoints=None if path is None else Checkpoints(path / CHECKPOINTS, keep),
        )
        settings = settings_of(
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            optimizer=optimizer if isinstance(optimizer, str) else "a function",
            rules=rules,
            seed=seed,
        )
        ready = dataclasses.replace(ready, facts={**ready.facts, "settings": settings})
        if resume:
            ready = resumed(ready, steps)
        elif overwrite and path is not None:
            _clear(path)
        keeps_start = path is not None and rules is not None and takes_from_base(params)
        summary = lj.summary(params)
        del params

        # Training, and the adapter on its own.
        began = time.perf_counter()
        forward = _forward(model, ready)
        step = compile_step(ready, forward, loss)
        compile_seconds = time.perf_counter() - began
        if path is not None and keeps_start and first is None:
            # So that a resumed run decomposes nothing again.
            lj.save_adapter(path / START, lj.join(ready.state.adapter, ready.base))
        a_tenth = max(1, steps // 10)
        pace = _Pace(
            log_every=log_every or a_tenth,
            eval_every=0 if measured is None else eval_every or a_tenth,
            save_every=steps if path is None else save_every or a_tenth,
            max_skipped=max_skipped,
        )
        recorder, stop = Recorder(log), Stop()
        hint = f"Go on with {as_argument('resume', True)}"
        stop.remedy = hint
        in_main = threading.current_thread() is threading.main_thread()  # signals come to no other
        with stop.listening() if path is not None and in_main else contextlib.nullcontext():
            trained, step_seconds = fit(
                ready,
                step,
                forward,
                loss,
                steps=steps,
                pace=pace,
                held_out=measured,
                log=recorder,
                stop=stop,
                resume_hint=hint,
            )
        if path is not None:
            lj.save_adapter(path / ADAPTER, trained, overwrite=True)
            stop.remedy = f"The adapter is in {path / ADAPTER}"
            stop.check()  # a signal in the last step
        found: Line = next((m for m in reversed(recorder.lines) if f"{HELD_OUT}loss" in m), {})
        return trained, Report(
            summary=summary,
            steps=steps,
            metrics=tuple(recorder.lines),
            held_out={k.removeprefix(HELD_OUT): v for k, v in found.items() if k != "step"},
            compile_seconds=compile_seconds,
            step_seconds=step_seconds,
            adapter=None if path is None else path / ADAPTER,
        )


def _as_examples(given: Examples | Mapping[str, Any], name: str) -> Examples:
    """Returns examples; a user's own arrays are checked for one length."""
    if isinstance(given, Mapping):
        arrays = {key: np.asarray(array) for key, array in given.items()}
        lengths = {key: array.shape[0] if array.ndim else None for key, array in arrays.items()}
        if not lengths or None in lengths.values() or len({*lengths.values()}) > 1:
            shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing"
            raise TrainingError(
                f"{name} has {shapes}: arrays of one length are needed, [n, …] each"
            )
        given = Arrays(arrays)
    if not isinstance(given, Examples):
        raise TrainingError(
            f"{name} is a {type(given).__name__}: give training.chats(rows, tokenizer, …), "
            "training.texts(rows, tokenizer, …), or a dict of arrays"
        )
    if not len(given):
        raise TrainingError(f"{name} is empty")
    return given


def _like(held_out: Examples, examples: Examples) -> Examples:
    """Returns the held-out examples; they have the arrays that the others have."""
    one = np.zeros(1, int)
    names = {*held_out.take(one)}, {*examples.take(one)}
    if names[0] != names[1]:
        theirs, ours = (", ".join(sorted(of_one)) for of_one in names)
        raise TrainingError(f"held_out has the arrays {theirs}; examples has {ours}")
    return held_out


def _check_length(steps: int | None, epochs: float | None) -> None:
    if steps is not None and epochs is not None:
        raise TrainingError("steps and epochs both say how long to train: give one of them")
    if epochs is not None and not (math.isfinite(epochs) and epochs > 0):
        raise TrainingError(f"epochs={epochs}: a positive number of passes over the examples")


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and not value >= 1:
            raise TrainingError(f"{name}={value}: at least 1 is needed")


def _loss_of(given: Any, examples: Examples, layout: Layout) -> Loss:
    """Returns the loss that is given, or the one that chats and texts have."""
    if isinstance(given, Loss):
        return given
    if given is not None:
        return Loss(given, unit=examples.unit)
    if isinstance(examples, Packs):
        layout.check_lengths(examples.lengths)
        chunk = _CHUNK * layout.token_parts
        return Loss(functools.partial(summed_loss, chunk=chunk, parts=layout.sequence_parts))
    if isinstance(examples, Labelled):
        return Loss(classification_loss, unit="text")
    raise TrainingError(
        "loss is missing: of your own arrays, give a function (forward, params, batch, "
        "dropout_key) -> training.Sums(total, count, logs)"
    )


def _check_folder(folder: str | Path | None, resume: bool, overwrite: bool) -> Path | None:
    """Returns the run's folder, made if need be; changes nothing that is in it."""
    if resume and overwrite:
        raise TrainingError("resume goes on with a run and overwrite deletes it: give one of them")
    if folder is None:
        if resume or overwrite:
            name = "resume" if resume else "overwrite"
            raise TrainingError(f"{name}=True is about a run's folder: name it by folder")
        return None
    path = Path(folder).expanduser()
    if not (resume or overwrite) and any((path / name).exists() for name in _OURS):
        raise TrainingError(
            f"the folder {path} holds another run: go on with it by resume=True, delete it by "
            "overwrite=True, or name another"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"the folder {path} cannot be written: {error.strerror or error}"
        ) from error
    return path


def _clear(path: Path) -> None:
    """Deletes the run that the folder holds, and nothing else."""
    if is_first():
        for name in _OURS:
            if (path / name).is_dir():
                shutil.rmtree(path / name)
            else:
                (path / name).unlink(missing_ok=True)
    wait_for_all("the folder is cleared")


def _adapted(params: Any, rules: Any, kinds: Any, key: jax.Array, start: Path | None) -> Any:
    """Returns the adapted tree, whose trained arrays are this run's own.

    Args:
      params: plain, or adapted where `rules` is None.
      rules: say what trains.
      kinds: of the parameters, for presets of targets; None for a model of the user's own.
      key: of the adapter's start.
      start: the adapter that the run began with, where it took factors out of the base.
    """
    if rules is not None:
        if start is not None:
            return lj.load_adapter(start, params)
        return lj.lorafy(params, rules, key=key, kinds=kinds)
    leaves, _ = flatten_with_paths(params, is_leaf=is_node)
    if not any(is_node(leaf) for _, leaf in leaves):
        raise TrainingError(
            "rules is missing, and params is a plain tree: say what trains, such as "
            '[lora_jax.LoraRule(targets="all-linear", rank=8)], or give an adapted tree'
        )
    adapter, base = lj.split(params)
    return lj.join(jax.tree.map(jnp.copy, adapter), base)  # the step takes their memory over


def _forward(model: Any, ready: Ready) -> Callable[..., Any]:
    """Returns the function that the loss calls: adapted, a model's activations on the mesh."""
    if hasattr(model, "placement"):
        return ready.setup.forward(model)
    return lj.adapt(getattr(model, "apply", model))
