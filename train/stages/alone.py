"""The arrangement of a single run, which uses the command's console and whose errors end it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TypeVar

from rich.console import Console

from lora_jax.bank.together.side_by_side import side_by_side
from lora_jax.core.types import Forward, Model, Tree
from lora_jax.training.clock import StepClock
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.ready import TrainingStart, compile_step
from lora_jax.training.remat import compiled_bytes, step_bytes
from lora_jax.training.run.best import Best
from lora_jax.training.setup import CompiledStep
from lora_jax.training.step import Metrics, State
from train.run.intrinsic import model_in
from train.run.output import ADAPTER
from train.stages.estimate import StepEstimate, estimate_step
from train.stages.steps import drive
from train.stages.types import (
    BegunRun,
    Compilation,
    CompiledRuns,
    EndedTraining,
    Handover,
    OpenedRun,
    SharedModel,
    StepCompiler,
    TrainedRun,
)

Stage = TypeVar("Stage")


class StepsAlone:
    """Takes the steps of a single run. `StepsTogether` takes the steps of several runs."""

    def __init__(self, step: CompiledStep, forward: Forward, start: TrainingStart) -> None:
        """Keeps the state of `start`, which the first step donates."""
        self.step = step
        self.forward = forward
        self._layout = start.setup.layout
        self._state = start.state
        self._base = start.base

    def state(self, name: str) -> State:
        """Returns the state after the steps so far."""
        return self._state

    def take(self, batches: Mapping[str, HostBatch]) -> dict[str, Metrics]:
        """Takes a step with the run's batch and returns the metrics of the step."""
        ((name, batch),) = batches.items()  # there is one run
        placed_batch = self._layout.batch(batch, parts=True)
        self._state, metrics = self.step(self._state, self._base, placed_batch)
        return {name: metrics}

    @functools.cached_property
    def estimate(self) -> StepEstimate | None:
        """The compiler's estimate of the step; None if there is none."""
        return estimate_step(self.step, [*self._layout.mesh.devices.flat])

    def compilation(self, seconds: float, clock: StepClock) -> Compilation:
        """Returns the costs of compiling the step, which took `seconds`."""
        return Compilation(
            seconds=seconds,
            further_seconds=clock.compile_seconds,
            sizes=compiled_bytes(self.step),
            estimate=self.estimate,
        )


@dataclasses.dataclass(frozen=True)
class Alone:
    """The arrangement of a single run; see `train.stages.arrangement`."""

    console: Console

    def console_of(self, name: str) -> Console:
        """Returns the console of the command."""
        return self.console

    def tell(self, *lines: str) -> None:
        """Does nothing, because there is no table of runs."""

    def keep_log(self, run: OpenedRun, held: ExitStack) -> None:
        """Does nothing, because the command prints the log."""

    def attempt(self, run: OpenedRun, work: Callable[[], Stage], best: Best | None = None) -> Stage:
        """Returns the next stage of the run. An error in it ends the command."""
        return work()

    def arrays(self, run: OpenedRun, start: TrainingStart, params: Tree) -> State:
        """Returns the state before the first step."""
        return start.state

    def step_compiler(
        self, runs: Mapping[str, BegunRun], base: SharedModel, weights: Handover[Tree]
    ) -> StepCompiler:
        """Returns the function that compiles the step of the run for a model."""
        weights.take()  # the state of the run holds the weights
        (run,) = runs.values()
        opened = run.opened
        start = dataclasses.replace(run.start.content, state=run.arrays.take())

        def compile_for(model: Model) -> tuple[StepsAlone, int | None]:
            forward = start.setup.forward(model_in(opened.space, model))
            step = compile_step(start, forward, opened.loss)
            return StepsAlone(step, forward, start), step_bytes(step)

        return compile_for

    def train(self, compiled: CompiledRuns) -> dict[str, EndedTraining]:
        """Trains the run to its end and raises the error that ended it, if there is one."""
        ((name, run),) = compiled.runs.items()
        driver = compiled.driver.take()
        run.opened.stop.remedy = run.opened.hint
        with StepClock() as clock:
            driven_run = drive(run, compiled, driver, evaluations={}, clock=clock)
            (ending,) = side_by_side(driver.take, {name: driven_run}).values()
        if ending.error is not None:
            raise ending.error
        return {name: ending.result}

    def check_signal(self, run: TrainedRun) -> None:
        """Ends the command if a signal came during the last step."""
        stop = run.opened.stop
        stop.remedy = f"The adapter is in {run.opened.folder / ADAPTER}"
        stop.check()

    def evaluating(self, name: str) -> AbstractContextManager[object]:
        """Returns a context without an effect."""
        return nullcontext()
