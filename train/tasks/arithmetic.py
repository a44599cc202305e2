"""A task of `train.grpo` that learns in minutes: sums, by default with the decoder of `sums`."""

import dataclasses

from train.environments import arithmetic
from train.options.file import replace_options
from train.options.scripts.grpo import Config
from train.run.task import TaskRows
from train.tasks import prompts
from train.tasks.sums import MODEL

_DEFAULT_ROWS = 1_300


def completed(config: Config) -> Config:
    """Returns the options with a reward of right answers, unless the user passed --reward."""
    return config if config.data.reward else replace_options(config, {"reward": ("arithmetic",)})


def read_rows(config: Config) -> TaskRows:
    """Returns sums in the order of --seed, and other sums to measure on."""
    train_rows = arithmetic.rows(config.optim.seed, config.data.rows or _DEFAULT_ROWS)
    held_out_rows = arithmetic.rows(0, config.run.eval_questions or 0, held_out=True)
    return TaskRows(list(train_rows), list(held_out_rows))


TASK = dataclasses.replace(
    prompts.TASK,
    defaults=dataclasses.replace(
        prompts.TASK.defaults,
        model=MODEL,
        lr=1.5e-3,
        full_lr=3e-4,
        steps=700,
        eval_questions=256,
        seq_len=64,
        max_new_tokens=8,
        temperature=1.5,
    ),
    check=prompts.check_own_rows,
    completed=completed,
    rows=read_rows,
    most_questions=lambda config, rows: arithmetic.HELD_OUT,
)
