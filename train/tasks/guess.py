"""A task of `train.grpo` in several turns, whose best policy is known: a guessing game."""

import dataclasses

from train.console.errors import UserError
from train.environments.guess import NUMBERS, rows
from train.options.file import replace_options
from train.options.scripts.grpo import Config
from train.run.task import TaskRows
from train.tasks import prompts

_ROWS = 700
_NAME = "guess"  # of the environment


def completed(config: Config) -> Config:
    """Plays the game, where no other environment is asked for."""
    if config.data.environment is not None:
        return config
    return replace_options(config, {"environment": _NAME})


def check(config: Config) -> None:
    """Raises a UserError for options about other rows, and for a model that calls no tools."""
    prompts.check_own_rows(config)
    if config.data.model == prompts.TASK.defaults.model and config.data.chat_template is None:
        raise UserError(
            f"--dataset guess needs a model that was made for tools, which {config.data.model} was "
            "not: name one with --model"
        )


def read_rows(config: Config) -> TaskRows:
    """Returns games in the order of --seed, and others to measure on: each secret once."""
    n = config.run.eval_questions or 0
    return TaskRows([*rows(config.optim.seed, config.data.rows or _ROWS)], [*rows(0, n)])


TASK = dataclasses.replace(
    prompts.TASK,
    defaults=dataclasses.replace(prompts.TASK.defaults, eval_questions=7),
    check=check,
    completed=completed,
    rows=read_rows,
    most_questions=lambda config, rows: NUMBERS,
)
