"""The initial state of a new or resumed run, its hooks, and its compiled step.

The functions call a `TrainingStart`, the beginning of a run, `ready`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.core.opaque import unwrap_opaque_leaves
from lora_jax.core.types import Fields, Forward, Leaf, Tree
from lora_jax.core.weight import leaves_of
from lora_jax.saving.fingerprint import base_fingerprint, keys_that_differ
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.data.order import Batches
from lora_jax.training.errors import DamagedCheckpoint, Diverged, TrainingError
from lora_jax.training.layout import Layout
from lora_jax.training.loop import Hooks, PeriodicMeasure
from lora_jax.training.losses import Loss
from lora_jax.training.optimizer import averaged
from lora_jax.training.run.best import Best
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.run.log import Log
from lora_jax.training.setup import CompiledStep, Setup
from lora_jax.training.step import State

# Called with an adapted tree and a function that says whether to stop. Returns numbers by name that
# batches of held-out examples hold, such as KTO's divergence; None if it stopped.
BatchNumbers = Callable[[Tree, Callable[[], bool]], Mapping[str, float] | None]


class StateBatches(Protocol):
    """Makes batches that depend on the current state, such as rollouts."""

    def batch(self, number: int, state: State) -> HostBatch:
        """Returns the batch of the step with `number` steps before it and this state.

        Raises:
          Dropped: a signal came meanwhile.
        """

    def metrics(self, number: int) -> Mapping[str, float | None]:
        """Returns the newest batch's metrics for the log; None for unknown values."""

    def lost(self, number: int) -> str | None:
        """Returns the reason why training cannot use a batch, whose loss is then NaN, or None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStart:
    """The start of a run: its batches, the parts of its step, and its state.

    Attributes:
      feed: the batches.
      setup: the parts of a step, but for the model.
      state: the state to go on from.
      base: the frozen half of the parameters.
      checkpoints: the checkpoints to resume from and to write; None for none.
      facts: the data, base and options that each checkpoint records, as JSON.
      owed: the prefixes of the measures that an interrupted run did not take after its last step.
      best: keeps the best adapter; None for no such thing.
      live: makes batches that depend on the state, such as rollouts; None if the feed makes all.
      measured: computes numbers of the tree that held-out examples need; None for none.
    """

    feed: Batches
    setup: Setup
    state: State
    base: Tree
    checkpoints: Checkpoints | None
    facts: dict[str, Any]
    owed: tuple[str, ...] = ()
    best: Best | None = None
    live: StateBatches | None = None
    measured: BatchNumbers | None = None


def make_start(
    params: Tree,
    feed: Batches,
    *,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    key: jax.Array,
    checkpoints: Checkpoints | None = None,
    best: Best | None = None,
    noise: float = 0.0,
) -> TrainingStart:
    """Returns the state before the first step.

    Args:
      params: the adapted tree, on the layout's mesh. Its trained arrays may be donated.
      feed: the batches.
      layout: the mesh, and the sharding of everything on it.
      optimizer: Optax transformation of the adapter.
      schedule: the learning rate that the optimiser has, to be logged.
      key: PRNG key of dropout and noise.
      checkpoints: the checkpoints of the run's folder.
      best: keeps the best adapter.
      noise: the size of the noise on embeddings; see `lora_jax.training.neftune`.
    """
    adapter, base = lj.split(params)
    setup = Setup.make(layout, params, optimizer, schedule, noise=noise)
    return TrainingStart(
        feed=feed,
        setup=setup,
        state=setup.state(adapter, key),
        base=base,
        checkpoints=checkpoints,
        facts={"data": feed.digest(), "base": base_fingerprint(base)},
        best=best,
    )


def resume_start(ready: TrainingStart, steps: int) -> TrainingStart:
    """Returns the state of the newest checkpoint, or the first state without one.

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
        saved_run = ready.checkpoints.run_of_newest()
        if saved_run is not None:
            _check_settings(saved_run, ready)  # other rules make a state of other shapes
        raise
    done = int(state.step)
    if saved["data"] != ready.facts["data"] or not ready.feed.seek(saved["cursor"], done):
        raise _resume_error(
            "the training data differ from those that the run began with. Use the same data, or "
            "start another run."
        )
    different_weights = keys_that_differ(saved["base"], ready.facts["base"])
    if different_weights:
        raise _resume_error(
            "the base differs from the base that the run began with: "
            f"{len(different_weights)} of its weights differ, for example {different_weights[0]}. "
            "Load the same base, or start another run."
        )
    _check_settings(saved, ready)
    if done > steps:
        raise _resume_error(
            f"{done} steps are done, more than the {steps} asked for. Pass a larger number of "
            "steps."
        )
    if ready.best is not None:
        ready.best.go_on_from(done, saved.get("best"))
    return dataclasses.replace(ready, state=state, owed=tuple(saved.get("owed", ())))


def _check_settings(saved: Fields, ready: TrainingStart) -> None:
    """Raises a TrainingError if a checkpoint's settings differ from the run's."""
    saved_settings = saved.get("settings", {})
    changes = [
        f"{name} was {saved_settings.get(name)} and is now {value}"
        for name, value in ready.facts.get("settings", {}).items()
        if saved_settings.get(name) != value
    ]
    if changes:
        raise _resume_error(
            f"the run began with other settings: {'; '.join(changes)}. Use the same settings, or "
            "start another run."
        )


def _resume_error(why: str) -> TrainingError:
    return TrainingError(lambda option: f"{option('resume', True)}: {why}")


def paths_not_finite(params: Tree) -> list[str]:
    """Returns the paths of a plain tree's arrays that contain a NaN or an infinity.

    Of a quantized weight, the scales are checked: nothing is decoded.
    """

    def is_finite(leaf: Leaf) -> bool:
        """Returns True if all floats of a leaf are finite."""
        return all(
            bool(_all_finite(array))
            for array in jax.tree.leaves(leaf)
            if jnp.issubdtype(array.dtype, jnp.floating)
        )

    return [path for path, leaf in leaves_of(params)[0] if not is_finite(leaf)]


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    """Returns True if all elements are finite, as a [] bool array."""
    return jnp.isfinite(array).all()


def compile_step(ready: TrainingStart, forward: Forward, loss: Loss) -> CompiledStep:
    """Returns the step, compiled for the first batch, which has the largest shape.

    Batches of another shape are compiled when they come: a run has few shapes.

    Args:
      ready: the state to train from.
      forward: the adapted function that the loss calls.
      loss: the function to minimise, and who divides it.
    """

    step = CompiledStep(functools.partial(ready.setup.compile, forward, loss))
    first_batch = ready.setup.layout.batch(ready.feed.first(), parts=True)
    step.program(ready.state, ready.base, first_batch)
    return step


def make_hooks(
    ready: TrainingStart,
    loss: Loss,
    measures: Sequence[PeriodicMeasure] = (),
    resume_hint: str = "",
) -> Hooks:
    """Returns the hooks that connect the loop with a run.

    Args:
      ready: the state to train from, which the step donates.
      loss: the function that the step minimises.
      measures: measurements to take on the way; see `lora_jax.training.held_out`.
      resume_hint: tells an interrupted user how to go on.
    """
    feed, layout, checkpoints = ready.feed, ready.setup.layout, ready.checkpoints
    best, live = ready.best, ready.live

    def save(state: State, owed: Sequence[str]) -> None:
        """Saves a checkpoint with the facts that resuming needs."""
        if checkpoints is None:
            return
        facts = {**ready.facts, "cursor": feed.cursor(int(state.step)), "owed": [*owed]}
        if best is not None:
            facts["best"] = best.as_json()
        checkpoints.save(state, facts)
        if best is not None:
            best.keep_for(checkpoints.steps())

    def judge(state: State, measured: Mapping[str, float]) -> bool:
        if best is None:
            return False
        return best.judge(int(state.step), lambda: adapted_tree(ready, state), measured)

    return Hooks(
        batch=live.batch if live else lambda number, state: feed.batch(number),
        metrics=live.metrics if live else lambda number: {},
        lost=live.lost if live else lambda number: None,
        placed=lambda batch: layout.batch(batch, parts=True),
        tokens=feed.tokens,
        save=save,
        rows=feed.named,
        resume_hint=resume_hint,
        reduction=loss.reduction,
        measures=measures,
        owed=ready.owed,
        settle=checkpoints.settle if checkpoints else lambda: None,
        judge=judge,
    )


@contextlib.contextmanager
def open_log(log: Log, ready: TrainingStart) -> Iterator[None]:
    """Opens a run's log; a run that diverges within reports non-finite base weights.

    Raises:
      Diverged: too many steps in a row were skipped.
    """
    try:
        with log:
            yield
    except Diverged as error:
        paths = paths_not_finite(ready.base)
        if paths:
            raise Diverged(
                f"{len(paths)} weights of the base hold values that are not finite, for example "
                f"{paths[0]}, so no training on it can succeed. Load the base again, or use "
                "another base."
            ) from error
        raise


def final_tree(ready: TrainingStart, state: State) -> Tree:
    """Returns the adapted tree of a finished run.

    It has the adapter of the last step, averaged where the optimiser averages, or the best adapter
    (see `Best`).
    """
    if ready.checkpoints is not None:
        ready.checkpoints.close()
    tree = adapted_tree(ready, state)
    if ready.best is not None:
        tree = _place_adapter(ready, ready.best.load(tree))
    return unwrap_opaque_leaves(tree)


def adapted_tree(ready: TrainingStart, state: State) -> Tree:
    """Returns the adapted tree of a state, with an averaged adapter if the optimiser averages."""
    return lj.join(averaged(state.opt_state, state.adapter), ready.base)


def _place_adapter(ready: TrainingStart, loaded: Tree) -> Tree:
    """Places the adapter of a loaded tree on the mesh."""
    loaded_adapter, _ = lj.split(loaded)
    host_adapter = jax.tree.map(np.asarray, loaded_adapter)  # a jit of many processes takes it
    place = jax.jit(lambda adapter: adapter, out_shardings=ready.setup.where.adapter)
    adapter = place(host_adapter)
    return lj.join(adapter, ready.base)
