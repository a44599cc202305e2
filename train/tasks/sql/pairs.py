"""The default task of `train.dpo`: a right query, and one that is a mistake away from it."""

import dataclasses

from lora_jax.training.data.rows import Row
from train.data import dataset
from train.environments.sql.examples import SqlExample, evaluation_examples, training_examples
from train.options.scripts.dpo import Config
from train.run.task import TaskRows
from train.tasks import pairs
from train.tasks.sql import task as sql

STEPS = 35
_HELD_OUT = 64  # pairs on unseen schemas, to measure the loss on


def read_rows(config: Config) -> TaskRows:
    """Returns pairs on the training schemas and, with --eval-every, pairs on others."""
    data, optim = config.data, config.optim
    n = data.rows or STEPS * optim.batch_size * optim.grad_accum
    train = _pairs(training_examples(n, seed=optim.seed))
    measured = _pairs(evaluation_examples(_HELD_OUT)) if config.run.eval_every else None
    return TaskRows(
        [dataset.dataset_from_rows(data.dataset, train)],
        [] if measured is None else [dataset.dataset_from_rows("the questions", measured)],
    )


def _pairs(examples: list[SqlExample]) -> list[Row]:
    found: list[Row] = []
    for number, example in enumerate(examples):
        *asked, answer = example.messages
        if example.mistakes:
            wrong = {**answer, "content": example.mistakes[number % len(example.mistakes)]}
            found.append({"prompt": asked, "chosen": [answer], "rejected": [wrong]})
    return found


TASK = dataclasses.replace(
    pairs.TASK,
    defaults=dataclasses.replace(sql.TASK.defaults, lr=2e-4, full_lr=2e-5),
    check=sql.check,
    rows=read_rows,
    evaluation=sql.evaluation,
    reads=lambda config: ("loss", *sql.TASK.reads(config)),
    score=sql.TASK.score,
    baselines=sql.TASK.baselines,
)
