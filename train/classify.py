"""Text classification: `python -m train.classify` teaches MiniLM which words are positive.

`python -m train.classify --help` lists the options. A head on an encoder trains in full, the
encoder through LoRA, or in full as well, or not at all. `train.finetune` reads from top to bottom.
"""

from collections.abc import Sequence

import tyro

from lora_jax.training.stop import Stop
from train.finetune import finetune
from train.run import classify_options
from train.run.classify_options import Config, with_defaults
from train.run.errors import reported
from train.tasks.registry import TEXTS, find_task
from train.tasks.task import Task


def parse(args: Sequence[str] | None = None) -> Config:
    """Returns the options of a command line, by default this process's, with their defaults."""
    flat = tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[Config]]
    config = tyro.cli(flat, args=args, prog="python -m train.classify")
    return with_defaults(config, task_of(config).defaults)


def task_of(config: Config) -> Task:
    """Returns the task that --dataset names, or the one on its rows."""
    return find_task(config.data.dataset, TEXTS)


def check(config: Config) -> None:
    """Raises UserError where options make no sense, as far as can be told without data or model."""
    classify_options.check(config)
    task_of(config).check(config)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; bad input ends it with the exit code 2, a signal with its own."""
    config = parse(args)
    stop = Stop()
    with reported(), stop.listening():
        check(config)
        finetune("train.classify", config, task_of(config), stop)


if __name__ == "__main__":
    main()
