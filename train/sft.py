"""Supervised fine-tuning: `python -m train.sft` teaches SmolLM2 to answer questions in SQL.

`python -m train.sft --help` lists the options. The run itself is in `train.finetune`.
"""

import sys
from collections.abc import Mapping, Sequence

from lora_jax.training.errors import TrainingError
from train.console.errors import as_user_errors
from train.data.files import named
from train.finetune import finetune
from train.many.one import Asked
from train.many.runs import train_many
from train.options import sft as sft_options
from train.options.command import read_line
from train.options.defaults import with_defaults
from train.options.field import check_effects
from train.options.sft import Config
from train.options.table import TableRow, check_one_base, read_table
from train.options.tasks import CHATS, STREAMED, find_task
from train.processes.session import Session
from train.tasks.task import Task

_PROG = "python -m train.sft"


def parse(args: Sequence[str] | None = None) -> Config:
    """Parses a command line, by default this process's, and fills in the task's defaults.

    Raises:
      UserError: an option has no effect beside the others, or stands wrongly in the file that
        --config names.
    """
    config, on_line, in_file = read_line(Config(), sys.argv[1:] if args is None else args, _PROG)
    return _alone(config, on_line, in_file)


def _alone(config: Config, on_line: frozenset[str], in_file: Mapping[str, int]) -> Config:
    """Returns the options of a single run, with the task's defaults; see `parse`."""
    check_effects(config, on_line, in_file)
    return with_defaults(config, task_of(config).defaults)


def task_of(config: Config) -> Task:
    """Returns the task named by --dataset, or the task for a user's own rows."""
    kind = STREAMED if config.data.stream else CHATS
    return find_task([dataset.name for dataset in named(config.data.dataset)], kind)


def check(config: Config) -> None:
    """Raises a UserError for options that make no sense; reads neither data nor model."""
    sft_options.check(config)
    task_of(config).check_options(config)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Bad input exits with code 2, a signal with the signal's code."""
    session = Session()
    with session.running():
        given = sys.argv[1:] if args is None else args
        config, on_line, in_file = read_line(Config(), given, _PROG)
        if config.run.many is not None:
            rows = read_table(config, Config(), on_line | in_file.keys())
            return train_many("train.sft", asked_for(rows), session)
        config = _alone(config, on_line, in_file)
        check(config)
        finetune("train.sft", config, task_of(config), session)


def asked_for(rows: Sequence[TableRow[Config]]) -> list[Asked]:
    """Returns the runs of a table with their tasks, checked as a command line is.

    Raises:
      UserError: options make no sense, or adapters stand on different bases; names the row.
    """
    asked: list[Asked] = []
    for row in rows:
        with as_user_errors(TrainingError, prefix=f"{row.where}: "):
            task = task_of(row.options)
            config = with_defaults(row.options, task.defaults)
            check(config)
        asked.append(Asked(row._replace(options=config), task))
    check_one_base([one.row for one in asked])
    return asked


if __name__ == "__main__":
    main()
