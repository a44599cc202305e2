"""The default task of `train.distill`: questions in SQL, which another adapter can answer."""

import dataclasses

from train.tasks import distillation
from train.tasks.sql import rewarded
from train.tasks.sql import task as sql

TASK = dataclasses.replace(
    distillation.TASK,
    defaults=dataclasses.replace(rewarded.TASK.defaults, lr=1e-4, full_lr=1e-5),
    check=sql.check,
    rows=rewarded.read_rows,
    evaluation=sql.evaluation,
    score=sql.TASK.score,
    baselines=sql.TASK.baselines,
)
