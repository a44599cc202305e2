"""Runs side by side: each has a console in its folder and keeps its errors; steps are common."""

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

# Where runs are over, the others' step is compiled anew for fewer if it has as many to take.
_WORTH_COMPILING = 50
Stage = TypeVar("Stage")


class StepsTogether:
    """Takes the common steps of runs."""

    def __init__(self, together: Together, forward: Forward) -> None:
        """Begins with the runs' states, which `together` holds."""
        self.together, self.forward, self.clock = together, forward, StepClock()

    def state(self, name: str) -> State:
        """Returns a copy of the state of a run."""
        return self.together.state(name)

    def take(self, batches: Mapping[str, HostBatch]) -> Mapping[str, Metrics]:
        """Takes a step with each run that has a batch; returns the metrics by name."""
        self.clock.under_way = self.together.step(batches)
        return self.clock.under_way

    def compilation(self, seconds: float, clock: StepClock) -> None:
        """Returns None: the step is not that of one run."""


class SideBySide:
    """The arrangement of the runs of a table; see `train.stages.arrangement`."""

    def __init__(self, console: Console, session: Session) -> None:
        """Begins without runs.

        Args:
          console: the console of the command.
          session: tells of signals.
        """
        self.console, self._session = console, session
        self._consoles: dict[str, BufferedConsole] = {}

    def console_of(self, name: str) -> Console:
        """Returns a console whose lines are kept until the run's folder is its own."""
        return self._consoles.setdefault(name, BufferedConsole()).console

    def tell(self, *lines: str) -> None:
        """Tells lines about the table."""
        tell(self.console, *lines)

    def keep_log(self, run: OpenedRun, held: ExitStack) -> None:
        """Writes the lines of the run to log.txt; removes the file of an earlier error."""
        self._consoles[run.name].keep_in(run.folder, held)
        (run.folder / ERROR).unlink(missing_ok=True)

    def attempt(
        self, run: OpenedRun, work: Callable[[], Stage], best: Best | None = None
    ) -> Stage | FailedRun:
        """Returns the next stage of a run, or the run with the error that ends it alone.

        Args:
          run: the run.
          work: makes the next stage.
          best: keeps the best adapter so far.
        """
        try:
            return work()
        except Exception as error:
            return failed_run(run, error, best)

    def arrays(self, run: OpenedRun, start: TrainingStart, params: Tree) -> Tenant:
        """Returns the adapter, whose slot makes a new state: there alone it takes memory."""
        optim, steps = run.config.optim, run.inputs.steps
        schedule, state = start.setup.schedule, start.state
        tenant = make_tenant(optim, params, schedule, steps, loss=run.loss, key=state.key)
        return dataclasses.replace(tenant, state=state) if int(state.step) else tenant

    def step_compiler(
        self, runs: Mapping[str, BegunRun], base: SharedModel, weights: Handover[Tree]
    ) -> StepCompiler:
        """Places the adapters; returns the function that compiles the common step for a model."""
        layout = base.layout
        tenants = {name: run.arrays.take() for name, run in runs.items()}
        drops_out = any(has_dropout(tenant.params) for tenant in tenants.values())

        def forward_of(model: Model) -> Forward:
            return lj.adapt(layout.constrained(model, dropout=drops_out).apply)

        together = Together(
            forward_of(base.model), weights.take(), compiler_options=layout.compiler_options
        )
        with jax.set_mesh(layout.mesh), doing(self.console, "placing the adapters"):
            together.add(tenants)
            tenants.clear()
        batches = {name: run.batch for name, run in runs.items()}

        def compile_for(model: Model) -> tuple[StepsTogether, int | None]:
            forward = forward_of(model)
            together.use(forward)
            with jax.set_mesh(layout.mesh):
                return StepsTogether(together, forward), together.compile(batches)

        return compile_for

    def train(self, compiled: CompiledRuns) -> dict[str, EndedTraining]:
        """Trains all runs as far as each goes."""
        runs = compiled.runs
        driver = compiled.driver.take()
        together = driver.together
        clock = driver.clock
        stop = self._session.stop
        together.use(driver.forward)
        board = Board(self.console, {name: run.opened.end for name, run in runs.items()})
        evaluations: Evaluations = {}
        endings: dict[str, EndedTraining] = {}

        def ended(name: str, ending: RunEnding) -> None:
            together.remove(name)
            run = runs[name]
            endings[name] = ending.result
            if ending.error is not None:
                endings[name] = failed_run(run.opened, ending.error, run.best)
            board.ended(name, endings[name].state)

        def turned() -> None:
            together.shrink(_WORTH_COMPILING)
            board.show()

        with jax.set_mesh(compiled.base.layout.mesh):
            driven_runs: dict[str, DrivenRun] = {}
            for name, run in runs.items():
                stop.remedy = run.opened.hint
                driven_runs[name] = drive(run, compiled, driver, evaluations, clock, board)
                board.note(name, {"step": together.done(name)})
            with board, clock, stop.deferred():
                side_by_side(driver.take, driven_runs, ended=ended, turned=turned)
                board.show()
        return endings

    def check_signal(self, run: TrainedRun) -> None:
        """Checks nothing: the table ends as a whole."""

    def evaluating(self, name: str) -> AbstractContextManager[object]:
        """Returns a context that names the run."""
        return doing(self.console, f"evaluating {name}")


def failed_run(run: OpenedRun, error: BaseException, best: Best | None) -> FailedRun:
    """Returns a run that an error ended, which its folder keeps unless a signal ended it."""
    failed = FailedRun(opened=run, best=best_facts(best), error=error)
    if isinstance(error, Stopped):
        return failed
    message = "".join(traceback.format_exception(error))
    if isinstance(error, TrainingError):
        message = error.said(flag)
    tell(run.console, f"error: {message}")
    write_text(run.folder / ERROR, f"{message.rstrip()}\n")
    return failed
