"""A task of `train.grpo` in several turns: a guessing game, whose best policy is known."""

import dataclasses

from train.console.errors import UserError
from train.environments.guess import NUMBERS, rows
from train.options.file import replace_options
from train.options.scripts.grpo import Config
from train.run.task import TaskRows
from train.tasks import prompts

_DEFAULT_ROWS = 700
_ENVIRONMENT = "guess"


def completed(config: Config) -> Config:
    """Returns the options with the game as environment, unless the user passed --environment."""
    if config.data.environment is not None:
        return config
    return replace_options(config, {"environment": _ENVIRONMENT})


def check(config: Config) -> None:
    """Raises a UserError for options about other rows, and for the default model."""
    prompts.check_own_rows(config)
    if config.data.model == prompts.TASK.defaults.model and config.data.chat_template is None:
        raise UserError(
            f"--dataset guess needs a model that was trained to call tools, but "
            f"{config.data.model} was not. Pass such a model with --model."
        )


def read_rows(config: Config) -> TaskRows:
    """Returns games in the order of --seed, and games to measure on, with each secret once."""
    train_rows = rows(config.optim.seed, config.data.rows or _DEFAULT_ROWS)
    held_out_rows = rows(0, config.run.eval_questions or 0)
    return TaskRows(list(train_rows), list(held_out_rows))


TASK = dataclasses.replace(
    prompts.TASK,
    defaults=dataclasses.replace(prompts.TASK.defaults, eval_questions=7),
    check=check,
    completed=completed,
    rows=read_rows,
    most_questions=lambda config, rows: NUMBERS,
)
