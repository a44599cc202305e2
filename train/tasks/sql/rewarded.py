"""The default task of `train.grpo`: SQL that is executed, from an adapter that learned to write it.

`train.start` makes that adapter where --init-adapter names none.
"""

import dataclasses

from lora_jax.training.data.rows import Row
from train.environments.sql.examples import SqlExample, training_examples
from train.options.file import replace_options
from train.options.scripts.grpo import Config
from train.run.task import TaskRows
from train.tasks import prompts
from train.tasks.sql import task as sql

_ROWS = 2_000


def completed(config: Config) -> Config:
    """Rewards by the result of executing the SQL, where nothing else is asked for."""
    return config if config.data.reward else replace_options(config, {"reward": ("sql",)})


def read_rows(config: Config) -> TaskRows:
    """Returns questions on the training schemas."""
    examples = training_examples(config.data.rows or _ROWS, seed=config.optim.seed)
    return TaskRows([_row(one) for one in examples], [])


def _row(example: SqlExample) -> Row:
    return {"prompt": example.messages[:-1], "schema": example.schema, "gold": example.sql}


TASK = dataclasses.replace(
    prompts.TASK,
    defaults=dataclasses.replace(sql.TASK.defaults, lr=5e-5, full_lr=5e-6, steps=100),
    check=sql.check,
    completed=completed,
    rows=read_rows,
    evaluation=sql.evaluation,
    score=sql.TASK.score,
    baselines=sql.TASK.baselines,
)
