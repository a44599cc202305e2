"""The loss on held-out examples, as a measure of a run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lj
from lora_jax.core.types import Adapter, Forward, Tree
from lora_jax.training.data.batches import Examples
from lora_jax.training.layout import Layout
from lora_jax.training.loop import PeriodicMeasure
from lora_jax.training.losses import HELD_OUT, Loss, Sums
from lora_jax.training.optimizer import averaged
from lora_jax.training.processes import Agreement
from lora_jax.training.ready import TrainingStart
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State, make_evaluation


class FormedTree(NamedTuple):
    """Runs a tree whose weights are costly to form: they are formed once for each measurement.

    Attributes:
      form: returns a plain tree from the adapted one.
      forward: the function of plain trees that the loss calls.
    """

    form: Callable[[Any], Any]
    forward: Forward


def held_out_loss(
    ready: TrainingStart,
    forward: Forward,
    loss: Loss,
    examples: Examples,
    *,
    every: int,
    stop: Stop,
    evaluation: Callable[..., Sums] | None = None,
    formed: FormedTree | None = None,
) -> PeriodicMeasure:
    """Returns the measure of a loss, and of its logs, on held-out examples.

    Args:
      ready: the run; its `measured` may give numbers to the batches.
      forward: the adapted function that the loss calls.
      loss: the function that trains; its `held_out` is measured.
      examples: are taken in batches of the run's size, none twice.
      every: steps between two measurements.
      stop: tells of a signal, which cuts a measurement short.
      evaluation: what `compiled_evaluation` returned, for runs that share it.
      formed: runs the examples in place of `forward`.
    """
    layout, loss = ready.setup.layout, loss.held_out
    if formed is not None:
        forward = formed.forward
    evaluate = evaluation or compiled_evaluation(layout, forward, loss)

    def halves(state: State) -> tuple[Adapter, Tree]:
        adapter = averaged(state.opt_state, state.adapter)
        if formed is None:
            return adapter, ready.base
        return {}, formed.form(lj.join(adapter, ready.base))

    def take(state: State) -> dict[str, float] | None:
        parts, agreement, (adapter, base) = [], Agreement(), halves(state)
        numbers: Mapping[str, float] | None = {}
        if ready.measured is not None:
            numbers = ready.measured(lj.join(adapter, base), lambda: stop.agreed(agreement))
        if numbers is None:
            return None
        for part in examples.parts(ready.feed.batch_size):
            part |= {name: np.full_like(part[name], x) for name, x in numbers.items()}
            batch = layout.batch(part, parts=False)
            with jax.set_mesh(layout.mesh):
                parts.append(jax.tree.map(float, evaluate(adapter, base, batch)))
            if stop.agreed(agreement):
                return None
        return means(loss, jax.tree.map(lambda *sums: sum(sums), *parts))

    return PeriodicMeasure(every=every, prefix=HELD_OUT, take=take)


def compiled_evaluation(layout: Layout, forward: Forward, loss: Loss) -> Callable[..., Sums]:
    """Returns ``(adapter, base, batch) -> sums``, compiled for each kind of adapter and shape.

    The sums are those of the loss's `held_out`.
    """
    return jax.jit(
        make_evaluation(forward, loss.held_out),
        out_shardings=layout.whole,
        compiler_options=layout.compiler_options,
    )


def means(loss: Loss, sums: Sums) -> dict[str, float]:
    """Returns the loss, in the sense of its reduction, and its logs divided by their counts.

    Returns {} where nothing counts: what was not measured is no loss of 0.
    """
    count: Any = sums.count
    if not count:
        return {}
    total: Any = sums.total / count if loss.reduction == "mean" else sums.total
    logs = {
        name: value / sums.count_of(name)
        for name, value in sums.logs.items()
        if sums.count_of(name)
    }
    return {"loss": total, **logs}
