"""Trains the runs of a comparison: adapters side by side, everything else one after another.

Runs go stage by stage (see `train.compare.rungs`): each is trained to the end of a stage, saved,
and goes on in the next one if its arm is kept. What was done stands in `sweep.json`; a run that was
interrupted goes on from its own checkpoint.
"""

import dataclasses
import functools
import gc
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from lora_jax.core.types import Forward, Tree
from lora_jax.training.errors import TrainingError
from lora_jax.training.processes import write_text
from train.compare import rungs
from train.compare.options import IN_FULL, CompareConfig, has_adapter
from train.compare.result import Arm, Rung, read_record, write_record
from train.compare.rungs import Stage
from train.compare.trials import Trial, groups_of
from train.console.errors import flag
from train.console.output import tell
from train.finetune import finetune, train_runs
from train.options.common import Options
from train.options.file import replace_options
from train.options.optim import warmup_steps
from train.processes.session import Session
from train.reporters.files import ERROR
from train.run.log import read_metrics
from train.run.output import ADAPTER, CHECKPOINTS, CONFIG, START, folder_bytes
from train.stages.beside import SideBySide
from train.stages.inputs import InputReader
from train.stages.types import AskedRun, FailedRun, FinishedRun, OpenedRun, RunContext

PROGRESS = "sweep.json"


@dataclasses.dataclass
class RunProgress:
    """The progress of a run.

    Attributes:
      stages: the stages that are over.
      seconds: the time they took; of runs side by side, an even share.
      side_by_side: the runs that shared steps, in the stage with the most of them.
      finished: whether it was trained to the end and measured.
      error: what ended it early.
      score: the task's own, at the end.
      saved_bytes: bytes of what it leaves to ship.
      outside: the loss on text outside the task, at the end.
      intruders: intruder dimensions of a matrix, on average, at the end.
    """

    stages: int = 0
    seconds: float = 0.0
    side_by_side: int = 1
    finished: bool = False
    error: str | None = None
    score: float | None = None
    saved_bytes: int | None = None
    outside: float | None = None
    intruders: float | None = None


@dataclasses.dataclass
class SweepRecord:
    """The progress of all runs.

    Attributes:
      date: when the comparison began, as ISO 8601 has it.
      runs: what was done of each run, by name.
      rungs: the decisions, stage by stage.
    """

    date: str
    runs: dict[str, RunProgress] = dataclasses.field(default_factory=dict)
    rungs: tuple[Rung, ...] = ()

    def progress(self, name: str) -> RunProgress:
        """Returns the progress of a run, a new one at first."""
        return self.runs.setdefault(name, RunProgress())


def read_progress(folder: Path, date: str) -> SweepRecord:
    """Returns the record of a folder, or a new one that begins now.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / PROGRESS
    return read_record(SweepRecord, path) if path.exists() else SweepRecord(date)


@dataclasses.dataclass(kw_only=True)
class Sweep:
    """The runs of a comparison on their way.

    Attributes:
      kind: the script that is compared, as the command line names it: "sft".
      folder: folder of the comparison.
      trials: all runs.
      record: what was done.
      context: what the runs share; its `hint` tells an interrupted user how to go on.
      asked: what is compared, and how.
      outside: returns the loss on text outside the task, of an adapted tree and the function that
        runs it; None measures nothing.
      intruders: returns the intruder dimensions of a run's tree; None counts none.
      session: tells of signals.
      console: console to print to.
    """

    kind: str
    folder: Path
    trials: Sequence[Trial]
    record: SweepRecord
    context: RunContext
    asked: CompareConfig
    outside: Callable[[Tree, Forward], float] | None
    intruders: Callable[[OpenedRun, Tree], float] | None
    session: Session
    console: Console

    def run(self) -> None:
        """Trains all runs as far as each goes.

        Raises:
          Interrupted: after a signal, once what is on its way is saved.
        """
        stages = [*rungs.STAGES, rungs.LAST] if self.asked.early_stopping else [rungs.LAST]
        for number, stage in enumerate(stages):
            going = [trial for trial in self.trials if not self.is_over(trial)]
            waiting = [
                trial for trial in going if self.record.progress(trial.name).stages <= number
            ]
            before = stages[number - 1] if number and stage is not rungs.LAST else None
            # After a long warmup, two stages may end at one step.
            there = [each for each in waiting if before and _end(before, each) == _end(stage, each)]
            alive = {trial.arm for trial in self.trials} - self.stopped_arms()
            chooses = rungs.chooses(stage, alive)
            if stage is not rungs.LAST and not chooses:
                there = waiting  # on to the next one: to end here would cost time for nothing
            for trial in there:
                self.record.progress(trial.name).stages = number + 1
            waiting = [trial for trial in waiting if trial not in there]
            if waiting:
                self._say(number, len(stages), stage, waiting)
            for group in groups_of(waiting, self.asked.at_once):
                self._train(group, number, stage)
            if chooses and number == len(self.record.rungs):
                self._decide(stage)

    def stopped_arms(self) -> set[Arm]:
        """Returns the arms that the rule has stopped."""
        return {arm for rung in self.record.rungs for arm, _ in rung.stopped}

    def is_over(self, trial: Trial) -> bool:
        """Returns True if a run needs no more training."""
        done = self.record.progress(trial.name)
        return done.finished or done.error is not None or trial.arm in self.stopped_arms()

    def _say(self, number: int, n: int, stage: Stage, waiting: Sequence[Trial]) -> None:
        part = "to the end" if n == 1 else f"stage {number + 1} of {n}"
        side_by_side = sum(has_adapter(trial.arm.method) for trial in waiting)
        share = _share(stage, waiting)
        tell(
            self.console,
            f"{part}: {len(waiting)} runs to {share:.1%} of their steps, {side_by_side} of "
            f"them side by side ({self.asked.at_once} at once), the others one after another",
        )

    def _train(self, group: Sequence[Trial], number: int, stage: Stage) -> None:
        """Trains a group to the end of a stage, and records what came of it."""
        began = time.monotonic()
        until = None if stage is rungs.LAST else functools.partial(_end_of_stage, stage)

        def trained(run: OpenedRun, tree: Tree, forward: Forward) -> None:
            done = self.record.progress(run.folder.name)
            done.saved_bytes = folder_bytes(run.folder / ADAPTER)
            if self.outside is not None:
                done.outside = self.outside(tree, forward)
            if self.intruders is not None:
                done.intruders = self.intruders(run, tree)

        context = dataclasses.replace(self.context, until=until, on_trained=trained)
        first = group[0]
        if first.reads_alone:  # and what it read is closed in the end
            context = dataclasses.replace(context, reader=InputReader())
        with self.session.part():
            if has_adapter(first.arm.method):
                self._side_by_side(group, context)
            else:
                self._alone(first, context)
        gc.collect()
        seconds = (time.monotonic() - began) / len(group)
        for trial in group:
            done = self.record.progress(trial.name)
            done.seconds += seconds
            done.side_by_side = max(done.side_by_side, len(group))
            # A signal in the last step cuts off the measurement after it, still to do then.
            if done.error is None and not self.session.stop.signal:
                done.stages, done.finished = number + 1, until is None
        write_record(self.record, self.folder / PROGRESS)
        for trial in group:
            if self.record.progress(trial.name).finished:
                self._tidy(trial)
        self.session.stop.remedy = self.context.hint or ""
        self.session.stop.check()

    def _side_by_side(self, group: Sequence[Trial], context: RunContext) -> None:
        asked = [
            AskedRun(
                name=trial.name,
                where=f"run {trial.name}",
                options=_resumed_options(trial),
                task=trial.task,
            )
            for trial in group
        ]
        arrangement = SideBySide(self.console, self.session)
        for ending in train_runs(group[0].script, asked, self.session, arrangement, context):
            done = self.record.progress(ending.opened.name)
            if isinstance(ending, FailedRun) and ending.reason is not None:
                done.error = ending.reason
            if isinstance(ending, FinishedRun) and ending.score is not None:
                done.score = ending.score

    def _alone(self, trial: Trial, context: RunContext) -> None:
        done = self.record.progress(trial.name)
        tell(self.console, f"run {trial.name}")
        try:
            options = _resumed_options(trial)
            scores = finetune(trial.script, options, trial.task, self.session, context)
        except TrainingError as error:
            done.error = error.said(flag).strip().splitlines()[0]
            write_text(trial.folder / ERROR, f"{error.said(flag).rstrip()}\n")
            tell(self.console, f"error: {done.error}")
            return
        done.score = scores.get(trial.task.score or "", done.score)

    def _decide(self, stage: Stage) -> None:
        """Chooses the arms that go on, and records them."""
        before = self.stopped_arms()
        values: dict[Arm, list[float]] = {}
        for trial in self.trials:
            if trial.arm not in before:
                values.setdefault(trial.arm, []).append(self._newest(trial))
        means = {arm: sum(of_arm) / len(of_arm) for arm, of_arm in values.items()}
        larger = self.trials[0].by_score
        rung = rungs.decide(stage, means, _share(stage, self.trials), larger=larger)
        self.record.rungs = (*self.record.rungs, rung)
        write_record(self.record, self.folder / PROGRESS)
        tell(
            self.console,
            f"after {rung.share:.1%} of the steps, {len(rung.kept)} settings go on, and "
            f"{len(rung.stopped)} stop",
        )
        stopped = dict(rung.stopped)
        for trial in self.trials:
            if trial.arm in stopped:
                self._tidy(trial)

    def _newest(self, trial: Trial) -> float:
        """Returns the newest held-out loss, or score, of a run; NaN for one that failed."""
        if self.record.progress(trial.name).error is not None:
            return math.nan
        lines, name = read_metrics(trial.folder), trial.measured
        return next((line[name] for line in reversed(lines) if name in line), math.nan)

    def _tidy(self, trial: Trial) -> None:
        """Deletes the checkpoints and the full model of a run that is over."""
        for name in (CHECKPOINTS, START):
            shutil.rmtree(trial.folder / name, ignore_errors=True)
        if trial.arm.method in IN_FULL and not self.asked.keep_weights:
            shutil.rmtree(trial.folder / ADAPTER, ignore_errors=True)


def _end_of_stage(stage: Stage, steps: int, config: Options) -> int:
    """Returns the step that ends a stage of a run, by its number of steps and its options."""
    warmup = warmup_steps(config.optim, steps)
    every = config.run.eval_every or config.run.score_every
    return rungs.step_of(stage, steps, every, warmup)


def _end(stage: Stage, trial: Trial) -> int:
    return _end_of_stage(stage, trial.steps, trial.config)


def _share(stage: Stage, trials: Sequence[Trial]) -> float:
    """Returns the share of their steps that a stage takes runs to: not always that of the rule."""
    return max(_end(stage, trial) / trial.steps for trial in trials)


def _resumed_options(trial: Trial) -> Options:
    """Returns a run's options, with --resume where it has begun."""
    return replace_options(trial.config, {"resume": (trial.folder / CONFIG).exists()})
