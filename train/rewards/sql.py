"""The reward of SQL: what it returns on the databases of its schema, against the gold query."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from train.console.errors import as_user_errors
from train.rewards.reward import Reward, RewardBatch, RewardValues
from train.tasks.sql.judge import MATCHED, MISMATCH, judge

_NEEDS = ("schema", "gold")


def sql_reward(runs: float = 0.0) -> Reward:
    """Returns the reward 1 for SQL with the gold query's rows, `runs` with others, and else 0."""
    values = {MATCHED: 1.0, MISMATCH: runs}

    def judge_all(batch: RewardBatch) -> RewardValues:
        columns = (batch.columns[name] for name in _NEEDS)
        asked = list(zip(*columns, batch.completions, strict=True))
        distinct = list(dict.fromkeys(asked))
        with as_user_errors(ValueError, prefix="--reward sql: "):
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                said = threads.map(lambda one: judge(*one), distinct)
                found = dict(zip(distinct, said, strict=True))
        kinds = [found[one] for one in asked]
        rewards = np.array([values.get(kind, 0.0) for kind in kinds], np.float32)
        return RewardValues(rewards, kinds=dict(Counter(kinds)))

    return Reward(judge_all, _NEEDS)
