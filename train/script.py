"""A training script, which parses a command line and trains one run or a table of runs."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.training.errors import Interrupted, TrainingError
from train import BEGAN
from train.console.errors import as_user_errors
from train.console.output import tell
from train.finetune import finetune, train_runs
from train.options.common import Options
from train.options.defaults import Defaults
from train.options.field import check_effects
from train.options.file import replace_options
from train.options.paths import check_local
from train.processes import hosts
from train.processes.session import Session
from train.reporters.files import ERROR, write_csv
from train.run.board import print_results
from train.run.costs import whole_time
from train.run.output import ADAPTER
from train.run.task import PriorRuns, Task
from train.settings.command import read_line
from train.settings.defaults import check_files, fill_defaults
from train.settings.files import CONFIG
from train.settings.table import RESULTS, RunOptions, check_one_base, read_table
from train.settings.tasks import dataset_facts, find_task
from train.stages.beside import SideBySide
from train.stages.finish import result_of
from train.stages.types import FailedRun, FinishedRun, RequestedRun, RunContext

FAILED = 1  # the exit code where some runs failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingScript:
    """A script that trains models.

    Attributes:
      name: its module: "train.sft".
      plain: its options, none of them given.
      check_options: raises a UserError for options that make no sense for any task.
      completed: fills in a task's defaults.
      with_dataset: fills in --dataset where it depends on the options that were given.
      prior: trains what a run begins with; None where no task of the script needs it.
      own_output: the output folder, if none is given, of a run on other data than the default ones;
        None for the same. --resume also finds a run of these data in the folder of the default
        ones, where older runs are.
    """

    name: str
    plain: Options
    check_options: Callable[[Any], None]
    completed: Callable[[Any, Defaults], Any] = fill_defaults
    with_dataset: Callable[[Any, Collection[str]], Any] = lambda config, given: config
    prior: PriorRuns | None = None
    own_output: str | None = None

    def parse(self, args: Sequence[str] | None = None) -> Any:
        """Parses a command line, by default this process's, and fills in the task's defaults.

        Raises:
          UserError: an option has no effect beside the others, or stands wrongly in the file that
            --config names.
        """
        config, line_options, file_options = self._read(args)
        return self._single_run_options(config, line_options, file_options)

    def _read(self, args: Sequence[str] | None) -> tuple[Any, frozenset[str], dict[str, int]]:
        """Parses a command line; returns options, and those set on the line and in a file."""
        arguments = sys.argv[1:] if args is None else args
        config, line_options, file_options = read_line(self.plain, arguments, self.name)
        set_options = line_options | file_options.keys()
        config = self.with_dataset(config, set_options)
        has_own_data = config.data.dataset != self.plain.data.dataset
        if has_own_data and self.own_output and "output" not in set_options:
            own_folder = Path(self.own_output)
            older_folder = Path(config.run.output)
            resumes_older_run = (
                config.run.resume and _holds_run(older_folder) and not _holds_run(own_folder)
            )
            if not resumes_older_run:
                config = replace_options(config, {"output": self.own_output})
        return config, line_options, file_options

    def _single_run_options(
        self, config: Options, line_options: frozenset[str], file_options: Mapping[str, int]
    ) -> Any:
        """Returns the options of a single run, with the task's defaults; see `parse`."""
        check_effects(config, dataset_facts(config), line_options, file_options)
        return self.completed(config, self.task_of(config).defaults)

    def task_of(self, config: Options) -> Task:
        """Returns the task named by --dataset, or the task for a user's own rows."""
        return find_task(self.name, config.data)

    def begin(self, config: Options, task: Task, session: Session) -> Any:
        """Returns the options with the model or adapter that the task starts from."""
        return config if self.prior is None else task.begin(config, session, self.prior)

    def check(self, config: Options) -> None:
        """Raises a UserError for invalid options, without reading data or model."""
        self.check_options(config)
        check_files(config)
        self.task_of(config).check_options(config)

    def main(self, args: Sequence[str] | None = None) -> None:
        """Runs the command line. Bad input exits with code 2, a signal with the signal's code."""
        session = Session(BEGAN if args is None else None)
        with session.running():
            config, line_options, file_options = self._read(args)
            if getattr(config.run, "many", None) is not None:
                check_local("output", [config.run.output])  # a table is a folder of this machine
                lines = read_table(config, self.plain, line_options | file_options.keys())
                runs = [
                    dataclasses.replace(run, options=self.begin(run.options, run.task, session))
                    for run in self.asked_for(lines)
                ]
                return train_many(self.name, runs, session)
            config = self._single_run_options(config, line_options, file_options)
            self.check(config)
            task = self.task_of(config)
            finetune(self.name, self.begin(config, task, session), task, session)

    def asked_for(self, lines: Sequence[RunOptions[Any]]) -> list[RequestedRun]:
        """Returns the runs of a table with their tasks, after checking their options.

        Raises:
          UserError: options make no sense, or adapters stand on different bases; names the line.
        """
        runs: list[RequestedRun] = []
        completed_lines: list[RunOptions[Any]] = []
        for line in lines:
            with as_user_errors(TrainingError, prefix=f"{line.where}: "):
                task = self.task_of(line.options)
                config = self.completed(line.options, task.defaults)
                self.check(config)
            has_begun = _holds_run(Path(config.run.output).expanduser())  # else its line is new
            config = replace_options(config, {"resume": config.run.resume and has_begun})
            completed_lines.append(line._replace(options=config))
            runs.append(RequestedRun(name=line.name, where=line.where, options=config, task=task))
        check_one_base(completed_lines)
        return runs


def _holds_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def train_many(script: str, asked: Sequence[RequestedRun], session: Session) -> None:
    """Trains a table of runs, and writes the results beside the runs' folders.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      asked: the runs, checked, with their tasks' defaults.
      session: tells of signals.

    Raises:
      TrainingError: a run asks for something that cannot be done; nothing was trained.
      Interrupted: after a signal, once the last step of each run is saved.
      SystemExit: with code 1, once all others are done, if a run failed.
    """
    console = hosts.console()
    arrangement = SideBySide(console, session)
    endings = train_runs(script, asked, session, arrangement, RunContext())
    results = [result_of(ending) for ending in endings]
    parent = endings[0].opened.folder.parent
    write_csv(parent / RESULTS, [results[0], *(result.values() for result in results)])
    print_results(console, results, hidden=("adapter", "error"))
    unfinished_runs = [ending for ending in endings if isinstance(ending, FailedRun)]
    failed_runs = [ending for ending in unfinished_runs if ending.state == "failed"]
    for failed_run in failed_runs:
        run = failed_run.opened
        error_line = f"error: {run.name} failed: {failed_run.reason} ({run.folder / ERROR})"
        print(error_line, file=sys.stderr, flush=True)
    total_time = whole_time((ending.opened.folder for ending in endings), session)
    tell(console, f"the whole table took {total_time}; its results are in {parent / RESULTS}")
    if any(isinstance(ending, FinishedRun) for ending in endings):
        tell(console, f"adapters: {parent / 'NAME' / ADAPTER}, with a run's name")
    n_stopped = len(unfinished_runs) - len(failed_runs)
    if n_stopped:
        hint = session.stop.remedy
        text = f"stopped {n_stopped} of {len(endings)} runs, each saved. {hint}"
        raise Interrupted(text, session.stop.code)
    session.stop.check()
    if failed_runs:
        print(
            f"\n{len(failed_runs)} of {len(endings)} runs failed, and the others are done.",
            file=sys.stderr,
        )
        sys.exit(FAILED)
