"""A run of training, from an adapted tree to a trained one: what scripts and `finetune` share."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.core.weight import leaves_of
from lora_jax.models import Decoder
from lora_jax.saving.fingerprint import base_fingerprint, differing
from lora_jax.training.batches import Examples, Packs
from lora_jax.training.data.order import Batches
from lora_jax.training.errors import DamagedCheckpoint, Diverged, TrainingError
from lora_jax.training.layout import Layout
from lora_jax.training.loop import Hooks, Measure, Pace, taken, train
from lora_jax.training.losses import Loss
from lora_jax.training.optimizer import averaged
from lora_jax.training.optimizers.named import OPTIMIZERS
from lora_jax.training.run.best import Best
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.run.log import Log
from lora_jax.training.run.stop import Stop
from lora_jax.training.setup import CompiledStep, Setup
from lora_jax.training.step import State, Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """Holds what training begins with.

    Attributes:
      feed: the batches.
      setup: the parts of a step, but for the model.
      state: the state to go on from.
      base: the frozen half of the parameters.
      checkpoints: the checkpoints to resume from and to write; None for none.
      facts: the data, base and options that each checkpoint records, as JSON.
      owed: the prefixes of the measures that an interrupted run did not take after its last step.
      best: keeps the best adapter; None for no such thing.
    """

    feed: Batches
    setup: Setup
    state: State
    base: Any
    checkpoints: Checkpoints | None
    facts: dict[str, Any]
    owed: tuple[str, ...] = ()
    best: Best | None = None


def make_ready(
    params: Any,
    feed: Batches,
    *,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    key: jax.Array,
    checkpoints: Checkpoints | None = None,
    best: Best | None = None,
    noise: float = 0.0,
) -> Ready:
    """Returns the state before the first step.

    Args:
      params: the adapted tree, on the layout's mesh. Its trained arrays may be donated.
      feed: the batches.
      layout: the mesh, and the sharding of everything on it.
      optimizer: of the adapter.
      schedule: the learning rate that the optimiser has, to be logged.
      key: of dropout and noise.
      checkpoints: those of the run's folder.
      best: keeps the best adapter.
      noise: the size of the noise on embeddings; see `lora_jax.training.neftune`.
    """
    adapter, base = lj.split(params)
    setup = Setup.of(layout, params, optimizer, schedule, noise=noise)
    return Ready(
        feed=feed,
        setup=setup,
        state=setup.state(adapter, key),
        base=base,
        checkpoints=checkpoints,
        facts={"data": feed.digest(), "base": base_fingerprint(base)},
        best=best,
    )


def resumed(ready: Ready, steps: int) -> Ready:
    """Returns the state of the newest checkpoint; where there is none, the first.

    Raises:
      TrainingError: the checkpoint is damaged, of other data, another base or other settings, or
        later than `steps`; or the best adapter before it is lost.
    """
    if ready.checkpoints is None or not ready.checkpoints.steps():
        if ready.best is not None:
            ready.best.go_on_from(0, None)
        return ready
    try:
        state, saved = ready.checkpoints.restore(ready.state)
    except DamagedCheckpoint:
        if (whole := ready.checkpoints.run_of_newest()) is not None:
            _check_settings(whole, ready)  # other rules make a state of other shapes
        raise
    done = int(state.step)
    if saved["data"] != ready.facts["data"] or not ready.feed.seek(saved["cursor"], done):
        raise TrainingError(
            lambda option: (
                f"{option('resume', True)}: the training data are not those that the run began with"
            )
        )
    if wrong := differing(saved["base"], ready.facts["base"]):
        raise TrainingError(
            lambda option: (
                f"{option('resume', True)}: the base is not the one that the run began with; "
                f"{len(wrong)} of its weights differ, {wrong[0]} among them"
            )
        )
    _check_settings(saved, ready)
    if done > steps:
        raise TrainingError(
            lambda option: (
                f"{option('resume', True)}: {done} steps are done, more than the {steps} asked for"
            )
        )
    if ready.best is not None:
        ready.best.go_on_from(done, saved.get("best"))
    return dataclasses.replace(ready, state=state, owed=tuple(saved.get("owed", ())))


def _check_settings(saved: Mapping[str, Any], ready: Ready) -> None:
    was, now = saved.get("settings", {}), ready.facts.get("settings", {})
    if changed := [name for name in now if was.get(name) != now[name]]:
        differing_settings = "; ".join(f"{n} was {was.get(n)} and is now {now[n]}" for n in changed)
        raise TrainingError(
            lambda option: (
                f"{option('resume', True)}: the run began with other settings: {differing_settings}"
            )
        )


def check_positions(model: Any, examples: Examples) -> None:
    """Raises a TrainingError for sequences that are longer than a decoder's positions."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is None or not isinstance(model, Decoder) or not isinstance(examples, Packs):
        return
    if (longest := int(np.diff(examples.starts).max())) > most:
        raise TrainingError(
            f"a sequence has {longest} tokens, and the model {most} positions: "
            "give a smaller seq_len, or load it with from_pretrained(…, rope_scaling="
            '{"rope_type": "yarn", "factor": 2.0})'
        )


def check_optimizer(optimizer: Any, weight_decay: float) -> None:
    """Raises a TrainingError for an unknown optimiser, or a weight decay that it would not use."""
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise TrainingError(f"optimizer={optimizer!r}: give {', '.join(OPTIMIZERS)}, or your own")
    if not isinstance(optimizer, str) and weight_decay:
        raise TrainingError(
            f"weight_decay={weight_decay} is for optimizers by name: build it into your own"
        )


def settings_of(**settings: Any) -> dict[str, str]:
    """Returns the settings that a resumed run may not change, as text that never varies."""
    return {
        name: "a function" if callable(value) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        for name, value in settings.items()
    }


def not_finite(params: Any) -> list[str]:
    """Returns the paths of a plain tree whose arrays hold a NaN or an infinity.

    Of codes, the scales are looked at: nothing is decoded.
    """

    def is_finite(leaf: Any) -> bool:
        arrays = [x for x in jax.tree.leaves(leaf) if jnp.issubdtype(x.dtype, jnp.floating)]
        return all(bool(_all_finite(array)) for array in arrays)

    return [path for path, leaf in leaves_of(params)[0] if not is_finite(leaf)]


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    """Returns [] bool; as one compiled function, it needs no array of flags beside the weights."""
    return jnp.isfinite(array).all()


def compile_step(ready: Ready, forward: Callable[..., Any], loss: Loss) -> CompiledStep:
    """Returns the step, compiled for the first batch, which is of the largest shape.

    Batches of another shape are compiled when they come: a run has few shapes.

    Args:
      ready: the state to train from.
      forward: the adapted function that the loss calls.
      loss: the function to minimise, and who divides it.
    """

    step = CompiledStep(functools.partial(ready.setup.compile, forward, loss))
    first = ready.setup.layout.batch(ready.feed.first(), parts=True)
    step.of(ready.state, ready.base, first)
    return step


def fit(
    ready: Ready,
    step: Step,
    *,
    steps: int,
    pace: Pace,
    loss: Loss,
    measures: Sequence[Measure] = (),
    log: Log,
    stop: Stop,
    resume_hint: str = "",
) -> tuple[Any, float | None]:
    """Trains to the end, or until no better measurement comes (see `Best`).

    Args:
      ready: the state to train from, which the step donates.
      step: the compiled step.
      steps: the number of the last step.
      pace: says how often to log and save.
      loss: the function that the step minimises.
      measures: measurements to take on the way; see `lora_jax.training.held_out`.
      log: gets a line a window of steps.
      stop: tells of a signal.
      resume_hint: tells an interrupted user how to go on.

    Returns:
      The adapted tree, as after the last step or as it was the best, its adapter averaged where the
      optimiser averages; and the median seconds of a step (None where none was taken).

    Raises:
      Interrupted: after a signal, once the step is finished and saved.
      Diverged: too many steps in a row were skipped.
    """
    hooks = hooks_of(ready, loss, measures, resume_hint)
    with _run(ready, log):
        state, seconds = train(step, ready.state, ready.base, steps, pace, hooks, log, stop)
    return trained(ready, state), seconds


def fitted(
    ready: Ready,
    now: Callable[[], State],
    *,
    steps: int,
    pace: Pace,
    loss: Loss,
    measures: Sequence[Measure] = (),
    log: Log,
    stop: Stop,
    resume_hint: str = "",
) -> Generator[int, tuple[Mapping[str, Any], int], tuple[Any, float | None]]:
    """Trains as `fit` does, but leaves it to its driver to take the steps; see `loop.taken`.

    Args:
      ready: what training begins with; of its state, only the structure is looked at.
      now: returns the state after the steps so far.
      steps, pace, loss, measures, log, stop, resume_hint: see `fit`.
    """
    hooks = hooks_of(ready, loss, measures, resume_hint)
    with _run(ready, log):
        seconds = yield from taken(now, steps, pace, hooks, log, stop)
    return trained(ready, now()), seconds


def hooks_of(ready: Ready, loss: Loss, measures: Sequence[Measure], resume_hint: str) -> Hooks:
    """Returns what connects the loop with a run; see `fit`."""
    feed, layout, checkpoints = ready.feed, ready.setup.layout, ready.checkpoints
    best = ready.best

    def save(state: State, owed: Sequence[str]) -> None:
        if checkpoints is None:
            return
        facts = {**ready.facts, "cursor": feed.cursor(int(state.step)), "owed": [*owed]}
        if best is not None:
            facts["best"] = best.as_json()
        checkpoints.save(state, facts)
        if best is not None:
            best.keep_for(checkpoints.steps())

    def judge(state: State, measured: Mapping[str, float]) -> bool:
        return best is not None and best.judge(
            int(state.step), lambda: tree_of(ready, state), measured
        )

    return Hooks(
        batch=lambda number, state: feed.batch(number),
        placed=lambda batch: layout.batch(batch, parts=True),
        tokens=feed.tokens,
        save=save,
        rows=feed.named,
        resume_hint=resume_hint,
        reduction=loss.reduction,
        measures=measures,
        owed=ready.owed,
        judge=judge,
    )


@contextlib.contextmanager
def _run(ready: Ready, log: Log) -> Iterator[None]:
    """Opens the log; within, a run that diverges on a broken base says so."""
    try:
        with log:
            yield
    except Diverged as error:
        if bad := not_finite(ready.base):
            raise Diverged(
                f"{len(bad)} weights of the base hold values that are not finite, {bad[0]} among "
                "them: no training on it can succeed. Load the base again, or take another"
            ) from error
        raise


def trained(ready: Ready, state: State) -> Any:
    """Returns the adapted tree of a run that is over: the last or the best; see `fit`."""
    if ready.checkpoints is not None:
        ready.checkpoints.close()
    last = tree_of(ready, state)
    return last if ready.best is None else _on_mesh(ready, ready.best.load(last))


def tree_of(ready: Ready, state: State) -> Any:
    """Returns the adapted tree of a state, its adapter averaged where the optimiser averages."""
    return lj.join(averaged(state.opt_state, state.adapter), ready.base)


def _on_mesh(ready: Ready, loaded: Any) -> Any:
    """Returns an adapted tree with its adapter, read from a folder, on the mesh."""
    host = jax.tree.map(np.asarray, lj.split(loaded)[0])  # which many processes may give to a jit
    adapter = jax.jit(lambda adapter: adapter, out_shardings=ready.setup.where.adapter)(host)
    return lj.join(adapter, ready.base)
