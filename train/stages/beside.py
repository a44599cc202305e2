"""The arrangement of runs side by side. They share steps; each has its own log and errors."""

import dataclasses
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

import jax
from rich.console import Console

import lora_jax as lj
from lora_jax.bank.together.side_by_side import DrivenRun, RunEnding, side_by_side
from lora_jax.bank.together.tenants import Tenant
from lora_jax.bank.together.together import Together
from lora_jax.core.types import Forward, Model, Tree
from lora_jax.training.clock import StepClock
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import Stopped
from lora_jax.training.optimizer import has_dropout
from lora_jax.training.processes import write_text
from lora_jax.training.ready import TrainingStart
from lora_jax.training.run.best import Best
from lora_jax.training.step import Metrics, State
from train.console.errors import flag
from train.console.output import tell
from train.options.optim import make_tenant
from train.processes.session import Session
from train.reporters.files import ERROR
from train.run.board import Board, BufferedConsole
from train.run.log import doing
from train.stages.steps import Evaluations, drive
from train.stages.types import (
    BegunRun,
    CompiledRuns,
    EndedTraining,
    FailedRun,
    Handover,
    OpenedRun,
    SharedModel,
    StepCompiler,
    TrainedRun,
    best_facts,
)

# After the end of some runs, the step is compiled again for the others if this many steps remain.
_MIN_STEPS_TO_COMPILE_AGAIN = 50
Stage = TypeVar("Stage")


class StepsTogether:
    """Takes the common steps of several runs."""

    def __init__(self, together: Together, forward: Forward) -> None:
        """Keeps the runs' states, which `together` holds."""
        self.together = together
        self.forward = forward
        self.clock = StepClock()

    def state(self, name: str) -> State:
        """Returns a copy of the state of a run."""
        return self.together.state(name)

    def take(self, batches: Mapping[str, HostBatch]) -> Mapping[str, Metrics]:
        """Takes a step of each run that has a batch, and returns the metrics by name."""
        self.clock.under_way = self.together.step(batches)
        return self.clock.under_way

    @property
    def estimate(self) -> None:
        """None, because the step does not belong to one run."""

    def compilation(self, seconds: float, clock: StepClock) -> None:
        """Returns None, because the step does not belong to one run."""


class SideBySide:
    """The arrangement of the runs of a table; see `train.stages.arrangement`."""

    def __init__(self, console: Console, session: Session) -> None:
        """Creates an arrangement without runs.

        Args:
          console: the console of the command.
          session: reports signals.
        """
        self.console = console
        self._session = session
        self._consoles: dict[str, BufferedConsole] = {}

    def console_of(self, name: str) -> Console:
        """Returns a console that buffers its lines until the run may write to its folder."""
        return self._consoles.setdefault(name, BufferedConsole()).console

    def tell(self, *lines: str) -> None:
        """Prints lines about the table."""
        tell(self.console, *lines)

    def keep_log(self, run: OpenedRun, held: ExitStack) -> None:
        """Writes the lines of the run to log.txt; removes the file of an earlier error."""
        self._consoles[run.name].keep_in(run.folder, held)
        (run.folder / ERROR).unlink(missing_ok=True)

    def attempt(
        self, run: OpenedRun, work: Callable[[], Stage], best: Best | None = None
    ) -> Stage | FailedRun:
        """Returns the next stage of a run, or a `FailedRun` with the error that ended the run.

        Args:
          run: the run.
          work: makes the next stage.
          best: the best adapter so far.
        """
        try:
            return work()
        except Exception as error:
            return failed_run(run, error, best)

    def arrays(self, run: OpenedRun, start: TrainingStart, params: Tree) -> Tenant:
        """Returns the adapter as a tenant. A new run's state is created in its slot."""
        state = start.state
        tenant = make_tenant(
            run.config.optim,
            params,
            start.setup.schedule,
            run.inputs.steps,
            loss=run.loss,
            key=state.key,
        )
        is_resumed = int(state.step) > 0
        return dataclasses.replace(tenant, state=state) if is_resumed else tenant

    def step_compiler(
        self, runs: Mapping[str, BegunRun], base: SharedModel, weights: Handover[Tree]
    ) -> StepCompiler:
        """Places the adapters, and returns the function that compiles the common step."""
        layout = base.layout
        tenants = {name: run.arrays.take() for name, run in runs.items()}
        any_dropout = any(has_dropout(tenant.params) for tenant in tenants.values())

        def adapt_model(model: Model) -> Forward:
            return lj.adapt(layout.constrained(model, dropout=any_dropout).apply)

        together = Together(
            adapt_model(base.model), weights.take(), compiler_options=layout.compiler_options
        )
        with jax.set_mesh(layout.mesh), doing(self.console, "placing the adapters"):
            together.add(tenants)
            tenants.clear()  # frees the arrays that are now in slots
        batches = {name: run.batch for name, run in runs.items()}

        def compile_for(model: Model) -> tuple[StepsTogether, int | None]:
            forward = adapt_model(model)
            together.use(forward)
            with jax.set_mesh(layout.mesh):
                return StepsTogether(together, forward), together.compile(batches)

        return compile_for

    def train(self, compiled: CompiledRuns) -> dict[str, EndedTraining]:
        """Trains each run to its end."""
        runs = compiled.runs
        driver = compiled.driver.take()
        together = driver.together
        clock = driver.clock
        stop = self._session.stop
        together.use(driver.forward)
        board = Board(self.console, {name: run.opened.end for name, run in runs.items()})
        evaluations: Evaluations = {}
        endings: dict[str, EndedTraining] = {}

        def record_ending(name: str, ending: RunEnding) -> None:
            """Records the end of a run, and writes its error to its folder."""
            together.remove(name)
            run = runs[name]
            endings[name] = ending.result
            if ending.error is not None:
                endings[name] = failed_run(run.opened, ending.error, run.best)
            board.ended(name, endings[name].state)

        def after_step() -> None:
            together.shrink(_MIN_STEPS_TO_COMPILE_AGAIN)
            board.show()

        with jax.set_mesh(compiled.base.layout.mesh):
            driven_runs: dict[str, DrivenRun] = {}
            for name, run in runs.items():
                stop.remedy = run.opened.hint
                driven_runs[name] = drive(run, compiled, driver, evaluations, clock, board)
                board.note(name, {"step": together.done(name)})
            with board, clock, stop.deferred():
                side_by_side(driver.take, driven_runs, ended=record_ending, turned=after_step)
                board.show()
        return endings

    def check_signal(self, run: TrainedRun) -> None:
        """Does nothing, because a signal ends the table as a whole."""

    def evaluating(self, name: str) -> AbstractContextManager[object]:
        """Returns a context that prints the name of the run."""
        return doing(self.console, f"evaluating {name}")


def failed_run(run: OpenedRun, error: BaseException, best: Best | None) -> FailedRun:
    """Returns a run that ended with an error, and writes all errors but signals to its folder."""
    failed = FailedRun(opened=run, best=best_facts(best), error=error)
    if isinstance(error, Stopped):
        return failed
    message = "".join(traceback.format_exception(error))
    if isinstance(error, TrainingError):
        message = error.said(flag)
    tell(run.console, f"error: {message}")
    write_text(run.folder / ERROR, f"{message.rstrip()}\n")
    return failed
