"""Trains the runs of a comparison: adapters together in shared steps, other runs one by one.

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
from train.compare.trials import Trial, group_trials
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
from train.stages.types import FailedRun, FinishedRun, OpenedRun, RequestedRun, RunContext

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
        """Returns the progress of a run, which is new at first."""
        return self.runs.setdefault(name, RunProgress())


def read_progress(folder: Path, date: str) -> SweepRecord:
    """Returns the saved record of a folder, or a new record.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / PROGRESS
    return read_record(SweepRecord, path) if path.exists() else SweepRecord(date)


@dataclasses.dataclass(kw_only=True)
class Sweep:
    """Trains the runs of a comparison.

    Attributes:
      kind: the script that is compared, as the command line names it: "sft".
      folder: folder of the comparison.
      trials: all runs.
      record: what was done.
      context: what the runs share; its `hint` tells an interrupted user how to go on.
      config: what is compared, and how.
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
    config: CompareConfig
    outside: Callable[[Tree, Forward], float] | None
    intruders: Callable[[OpenedRun, Tree], float] | None
    session: Session
    console: Console

    def run(self) -> None:
        """Trains all runs stage by stage until each has finished or is stopped.

        Raises:
          Interrupted: after a signal, once what is on its way is saved.
        """
        stages = [*rungs.STAGES, rungs.LAST] if self.config.early_stopping else [rungs.LAST]
        for index, stage in enumerate(stages):
            pending_trials = [
                trial
                for trial in self.trials
                if not self.is_over(trial) and self.record.progress(trial.name).stages <= index
            ]
            # Train each run to the end of the stage, unless nothing is decided there.
            active_arms = {trial.arm for trial in self.trials} - self.stopped_arms()
            stops_arms = rungs.stops_arms(stage, active_arms)
            skipping_trials = self._runs_to_skip(stages, index, pending_trials, stops_arms)
            for trial in skipping_trials:
                self.record.progress(trial.name).stages = index + 1
            training_trials = [trial for trial in pending_trials if trial not in skipping_trials]
            if training_trials:
                self._print_stage(index, len(stages), stage, training_trials)
            for group in group_trials(training_trials, self.config.at_once):
                self._train_group(group, index, stage)
            is_undecided = index == len(self.record.rungs)
            if stops_arms and is_undecided:
                self._stop_arms(stage)

    def _runs_to_skip(
        self, stages: Sequence[Stage], index: int, trials: Sequence[Trial], stops_arms: bool
    ) -> Sequence[Trial]:
        """Returns the runs that can skip a stage, because no decision follows it.

        Args:
          stages: all stages.
          index: the index of the stage.
          trials: the runs that have not ended the stage.
          stops_arms: whether the rule stops arms after the stage.
        """
        stage = stages[index]
        if stage is rungs.LAST:
            return []
        if not stops_arms:
            return trials  # to end a stage for no decision costs time
        if index == 0:
            return []
        # After a long warmup, two stages may end at one step.
        previous_stage = stages[index - 1]
        return [
            trial for trial in trials if _end_step(previous_stage, trial) == _end_step(stage, trial)
        ]

    def stopped_arms(self) -> set[Arm]:
        """Returns the arms that were stopped early."""
        return {arm for rung in self.record.rungs for arm, _ in rung.stopped}

    def is_over(self, trial: Trial) -> bool:
        """Returns True if a run needs no more training."""
        progress = self.record.progress(trial.name)
        is_stopped = trial.arm in self.stopped_arms()
        return progress.finished or progress.error is not None or is_stopped

    def _print_stage(
        self, index: int, n_stages: int, stage: Stage, trials: Sequence[Trial]
    ) -> None:
        """Prints the number of runs that are trained to the end of a stage."""
        title = "to the end" if n_stages == 1 else f"stage {index + 1} of {n_stages}"
        n_adapters = sum(has_adapter(trial.arm.method) for trial in trials)
        tell(
            self.console,
            f"{title}: {len(trials)} runs to {_share_of_steps(stage, trials):.1%} of their steps, "
            f"{n_adapters} of them side by side ({self.config.at_once} at once), the others one "
            "after another",
        )

    def _train_group(self, group: Sequence[Trial], index: int, stage: Stage) -> None:
        """Trains a group to the end of a stage, and records the outcome."""
        start_time = time.monotonic()
        is_last = stage is rungs.LAST
        until = None if is_last else functools.partial(_end_step_of_run, stage)
        context = dataclasses.replace(
            self.context, until=until, on_trained=self._measure_trained_run
        )
        first_trial = group[0]
        if first_trial.reads_alone:  # and what it read is closed in the end
            context = dataclasses.replace(context, reader=InputReader())
        with self.session.part():
            if has_adapter(first_trial.arm.method):
                self._train_side_by_side(group, context)
            else:
                self._train_alone(first_trial, context)
        gc.collect()
        run_seconds = (time.monotonic() - start_time) / len(group)
        for trial in group:
            progress = self.record.progress(trial.name)
            progress.seconds += run_seconds
            progress.side_by_side = max(progress.side_by_side, len(group))
            # A signal in the last step cuts off the measurement after it, still to do then.
            if progress.error is None and not self.session.stop.signal:
                progress.stages = index + 1
                progress.finished = is_last
        write_record(self.record, self.folder / PROGRESS)
        for trial in group:
            if self.record.progress(trial.name).finished:
                self._delete_checkpoints(trial)
        self.session.stop.remedy = self.context.hint or ""
        self.session.stop.check()

    def _measure_trained_run(self, run: OpenedRun, tree: Tree, forward: Forward) -> None:
        """Records the measures of a run that was trained to the end, from its tree."""
        progress = self.record.progress(run.folder.name)
        progress.saved_bytes = folder_bytes(run.folder / ADAPTER)
        if self.outside is not None:
            progress.outside = self.outside(tree, forward)
        if self.intruders is not None:
            progress.intruders = self.intruders(run, tree)

    def _train_side_by_side(self, group: Sequence[Trial], context: RunContext) -> None:
        """Trains adapters in shared steps, and records their errors and scores."""
        runs = [
            RequestedRun(
                name=trial.name,
                where=f"run {trial.name}",
                options=_options_with_resume(trial),
                task=trial.task,
            )
            for trial in group
        ]
        arrangement = SideBySide(self.console, self.session)
        for ending in train_runs(group[0].script, runs, self.session, arrangement, context):
            progress = self.record.progress(ending.opened.name)
            if isinstance(ending, FailedRun) and ending.reason is not None:
                progress.error = ending.reason
            if isinstance(ending, FinishedRun) and ending.score is not None:
                progress.score = ending.score

    def _train_alone(self, trial: Trial, context: RunContext) -> None:
        """Trains one run by itself, and records its error or its score."""
        progress = self.record.progress(trial.name)
        tell(self.console, f"run {trial.name}")
        try:
            options = _options_with_resume(trial)
            scores = finetune(trial.script, options, trial.task, self.session, context)
        except TrainingError as error:
            message = error.said(flag)
            progress.error = message.strip().splitlines()[0]
            write_text(trial.folder / ERROR, f"{message.rstrip()}\n")
            tell(self.console, f"error: {progress.error}")
            return
        progress.score = scores.get(trial.task.score or "", progress.score)

    def _stop_arms(self, stage: Stage) -> None:
        """Chooses and records the arms that continue."""
        stopped_arms = self.stopped_arms()
        seed_values: dict[Arm, list[float]] = {}
        for trial in self.trials:
            if trial.arm not in stopped_arms:
                seed_values.setdefault(trial.arm, []).append(self._newest_value(trial))
        means = {arm: sum(values) / len(values) for arm, values in seed_values.items()}
        rung = rungs.decide_after_stage(
            stage, means, _share_of_steps(stage, self.trials), larger=self.trials[0].by_score
        )
        self.record.rungs = (*self.record.rungs, rung)
        write_record(self.record, self.folder / PROGRESS)
        tell(
            self.console,
            f"after {rung.share:.1%} of the steps, {len(rung.kept)} settings go on, and "
            f"{len(rung.stopped)} stop",
        )
        newly_stopped = {arm for arm, _ in rung.stopped}
        for trial in self.trials:
            if trial.arm in newly_stopped:
                self._delete_checkpoints(trial)

    def _newest_value(self, trial: Trial) -> float:
        """Returns the newest held-out loss or score of a run; NaN for a failed run."""
        if self.record.progress(trial.name).error is not None:
            return math.nan
        metric = trial.measured
        values: list[float] = [
            line[metric] for line in read_metrics(trial.folder) if metric in line
        ]
        return values[-1] if values else math.nan

    def _delete_checkpoints(self, trial: Trial) -> None:
        """Deletes the checkpoints and the full model of a run that needs no more training."""
        for name in (CHECKPOINTS, START):
            shutil.rmtree(trial.folder / name, ignore_errors=True)
        if trial.arm.method in IN_FULL and not self.config.keep_weights:
            shutil.rmtree(trial.folder / ADAPTER, ignore_errors=True)


def _end_step_of_run(stage: Stage, n_steps: int, config: Options) -> int:
    """Returns a run's last step in a stage, from the run's number of steps and options."""
    warmup = warmup_steps(config.optim, n_steps)
    interval = config.run.eval_every or config.run.score_every
    return rungs.end_step_of_stage(stage, n_steps, interval, warmup)


def _end_step(stage: Stage, trial: Trial) -> int:
    return _end_step_of_run(stage, trial.steps, trial.config)


def _share_of_steps(stage: Stage, trials: Sequence[Trial]) -> float:
    """Returns the share of its steps that a run has done after a stage; the largest of all runs."""
    return max(_end_step(stage, trial) / trial.steps for trial in trials)


def _options_with_resume(trial: Trial) -> Options:
    """Returns a run's options, with --resume if the run has begun."""
    return replace_options(trial.config, {"resume": (trial.folder / CONFIG).exists()})
