"""Drives several training runs side by side, one step of each at a time.

Each run is the loop of `lora_jax.training.loop.training_steps`, as a run alone has it; the driver
takes the steps of all at once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

from lora_jax.core.types import Leaf
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.errors import Dropped
from lora_jax.training.loop import Stopped

Metrics = Mapping[str, Leaf]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrivenRun:
    """A run whose steps are taken by the caller of its generator.

    Attributes:
      turns: yields the number of a step to take, is sent its metrics and tokens, and returns what
        came of the run; see `lora_jax.training.loop.training_steps`.
      batch: returns the batch of the step with that number; may raise `Dropped` after a signal.
      tokens: counts the tokens of a batch, without padding.
    """

    turns: Generator[int, tuple[Metrics, int], Any]
    batch: Callable[[int], HostBatch]
    tokens: Callable[[HostBatch], int]


@dataclasses.dataclass(frozen=True)
class RunEnding:
    """The result of a run, or the exception that ended it."""

    result: Any = None
    error: BaseException | None = None


def side_by_side(
    step: Callable[[Mapping[str, HostBatch]], Mapping[str, Metrics]],
    runs: Mapping[str, DrivenRun],
    *,
    ended: Callable[[str, RunEnding], object] = lambda name, ending: None,
    turned: Callable[[], object] = lambda: None,
) -> dict[str, RunEnding]:
    """Trains all runs to their ends; a run that ends or fails does not affect the others.

    Args:
      step: takes a step with each run that has a batch, and returns their metrics; see
        `Together.step`.
      runs: by name.
      ended: is called with the name of a run that is over, and what came of it.
      turned: is called after each step.

    Returns:
      What came of each run, by name. A signal that each run hears of ends each with `Stopped`.

    Raises:
      Exception: the common step failed; a second signal, which ends everything at once, too.
    """
    endings: dict[str, RunEnding] = {}
    next_steps: dict[str, int] = {}  # of the runs that go on

    def call_run(name: str, function: Callable[..., Any], *args: object) -> Any:
        """Calls a function of a run; returns None if that ends the run."""
        try:
            return function(*args)
        except StopIteration as end:
            endings[name] = RunEnding(result=end.value)
        except (Exception, Stopped) as error:
            endings[name] = RunEnding(error=error)
        next_steps.pop(name, None)
        runs[name].turns.close()
        ended(name, endings[name])
        return None

    def take_turn(name: str, step_result: tuple[Metrics, int] | None) -> None:
        """Sends a run the result of its last step, and stores the number of its next."""
        step_number = call_run(name, runs[name].turns.send, step_result)
        if step_number is not None:
            next_steps[name] = step_number

    try:
        for name in runs:
            take_turn(name, None)
        while next_steps:
            batches: dict[str, HostBatch] = {}
            for name, step_number in list(next_steps.items()):  # which loses the runs that end
                batch = call_run(name, _make_batch, runs[name], step_number)
                if batch is not None:
                    batches[name] = batch
            metrics = step(batches) if batches else {}
            for name, batch in batches.items():
                n_tokens = runs[name].tokens(batch)
                take_turn(name, (metrics[name], n_tokens))
            turned()
    except BaseException as error:  # the logs of the runs hear what ended them
        for run in runs.values():
            with contextlib.suppress(BaseException):
                run.turns.throw(error)
        raise
    finally:
        for run in runs.values():
            run.turns.close()
    return endings


def _make_batch(run: DrivenRun, step_number: int) -> HostBatch:
    """Returns a run's batch; if a signal dropped the batch, the run saves and stops."""
    try:
        return run.batch(step_number)
    except Dropped as dropped:
        run.turns.throw(dropped)
        raise
