"""Text classification: `python -m train.classify` teaches MiniLM which words are positive.

The head of the encoder trains in full; the encoder trains with LoRA, in full, or not at all.
`python -m train.classify --help` lists the options. The run itself is in `train.finetune`.
"""

import sys
from collections.abc import Sequence

from train.finetune import finetune
from train.options import classify as classify_options
from train.options.classify import Config, with_defaults
from train.options.command import read_line
from train.options.field import check_effects
from train.options.tasks import TEXTS, find_task
from train.processes.session import Session
from train.tasks.task import Task


def parse(args: Sequence[str] | None = None) -> Config:
    """Parses a command line, by default this process's, and fills in the task's defaults.

    Raises:
      UserError: an option has no effect beside the others, or stands wrongly in the file that
        --config names.
    """
    given = sys.argv[1:] if args is None else args
    config, on_line, in_file = read_line(Config(), given, "python -m train.classify")
    check_effects(config, on_line, in_file)
    return with_defaults(config, task_of(config).defaults)


def task_of(config: Config) -> Task:
    """Returns the task named by --dataset, or the task for a user's own rows."""
    return find_task([config.data.dataset], TEXTS)


def check(config: Config) -> None:
    """Raises a UserError for options that make no sense; reads neither data nor model."""
    classify_options.check(config)
    task_of(config).check_options(config)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Bad input exits with code 2, a signal with the signal's code."""
    session = Session()
    with session.running():
        config = parse(args)
        check(config)
        finetune("train.classify", config, task_of(config), session)


if __name__ == "__main__":
    main()
