"""The reward of SQL: what it returns on the databases of its schema, against the gold query."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from train.console.errors import as_user_errors
from train.rewards.reward import Batch, Judged
from train.tasks.sql.judge import MATCHED, MISMATCH, judge


class SqlReward:
    """Gives 1 for SQL with the gold query's rows; counts what becomes of all."""

    needs = ("schema", "gold")

    def __init__(self, runs: float = 0.0) -> None:
        """Sets the reward of SQL that runs and returns other rows."""
        self._values = {MATCHED: 1.0, MISMATCH: runs}

    def __call__(self, batch: Batch) -> Judged:
        """Returns the rewards, of equal completions one query's."""
        columns = (batch.columns[name] for name in self.needs)
        asked = list(zip(*columns, batch.completions, strict=True))
        distinct = list(dict.fromkeys(asked))
        with as_user_errors(ValueError, prefix="--reward sql: "):
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                said = threads.map(lambda one: judge(*one), distinct)
                found = dict(zip(distinct, said, strict=True))
        kinds = [found[one] for one in asked]
        values = np.array([self._values.get(kind, 0.0) for kind in kinds], np.float32)
        return Judged(values, kinds=dict(Counter(kinds)))

    def close(self) -> None:
        """Leaves the processes to the next query; they end with this one."""
