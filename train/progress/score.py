"""The task's own score while a run trains."""

from collections.abc import Callable
from typing import Any

from lora_jax.training.loop import Measure
from lora_jax.training.losses import SCORE
from lora_jax.training.processes import Agreement
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State
from train.tasks.task import Evaluation


class _Cut(Exception):
    """A signal came."""


def scoring(
    evaluation: Evaluation,
    model: Any,
    tree_of: Callable[[State], Any],
    forward: Callable[..., Any],
    *,
    every: int,
    stop: Stop,
) -> Measure:
    """Returns the measure of a task's score.

    Args:
      evaluation: scores the model.
      model: the model.
      tree_of: returns the adapted tree of a state.
      forward: the model's ``apply`` on an adapted tree.
      every: steps between two measurements.
      stop: tells of a signal, which cuts a measurement short.
    """

    def take(state: State) -> dict[str, float] | None:
        agreement = Agreement()

        def progress(done: int, total: int) -> None:
            if stop.agreed(agreement):
                raise _Cut

        try:
            return evaluation.score(model, tree_of(state), forward, progress)
        except _Cut:
            return None

    return Measure(every=every, prefix=SCORE, take=take)
