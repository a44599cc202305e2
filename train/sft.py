"""Supervised fine-tuning: `python -m train.sft` teaches SmolLM2 to answer questions in SQL.

`python -m train.sft --help` lists the options. The run itself is in `train.finetune`.
"""

import sys
from collections.abc import Sequence

from train.data.named import named
from train.finetune import finetune
from train.run.options import sft as sft_options
from train.run.options.command import read_command
from train.run.options.common import with_defaults
from train.run.options.sft import Config
from train.run.session import Session
from train.tasks.registry import CHATS, STREAMED, find_task
from train.tasks.task import Task


def parse(args: Sequence[str] | None = None) -> Config:
    """Parses a command line, by default this process's, and fills in the task's defaults.

    Raises:
      UserError: an option has no effect beside the others, or stands wrongly in the file that
        --config names.
    """
    given = sys.argv[1:] if args is None else args
    config = read_command(Config(), given, "python -m train.sft")
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
        config = parse(args)
        check(config)
        finetune("train.sft", config, task_of(config), session)


if __name__ == "__main__":
    main()
