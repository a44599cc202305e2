"""Calls a user's reward functions in separate processes."""

import base64
import json
import os
import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from train.console.errors import UserError
from train.processes.pool import NoAnswer, ProgramPool
from train.rewards import worker
from train.rewards.reward import RewardBatch, RewardValues

TIMEOUT, DIED = "timeout", "process ended"
_IMPORT_SECONDS = 120.0


class Workers:
    """Processes that have imported the functions. Each call is about the completions of one prompt.

    Attributes:
      needs: the columns that each function cannot do without.
    """

    def __init__(self, specs: Sequence[str], seconds: float, workers: int) -> None:
        """Starts one process, to check that it can import the functions.

        Args:
          specs: the functions, as ``file.py:function``.
          seconds: how long a function may take for the completions of one prompt.
          workers: the number of processes.

        Raises:
          UserError: a file or a function cannot be imported.
        """
        # A file may import others from here, too, where nothing else has their names.
        path = os.pathsep.join(dict.fromkeys([*sys.path, os.getcwd()]))
        # Of an accelerator this process has taken all memory; a file may set the variable anew.
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        command = [sys.executable, "-P", worker.__file__, *specs]
        self._seconds = seconds
        self._processes = ProgramPool(
            command, env, copies=workers, greeting_seconds=_IMPORT_SECONDS
        )
        try:
            greeting = json.loads(self._processes.start())
            if "error" in greeting:
                raise UserError(f"--reward {greeting['spec']}: {greeting['error']}")
        except NoAnswer as error:
            raise UserError(
                f"--reward {' '.join(specs)}: Importing the file failed: It {error}."
            ) from error
        except BaseException:
            self._processes.close()
            raise
        self.needs: list[list[str]] = greeting["needs"]
        self._threads = ThreadPoolExecutor(workers, "rewards")

    def judge(self, function: int, batch: RewardBatch) -> RewardValues:
        """Calls a function once for each prompt of a batch; returns its values."""
        starts = range(0, len(batch.completions), batch.group)
        groups = [slice(start, start + batch.group) for start in starts]
        try:
            answers = list(self._threads.map(lambda rows: self._ask(function, batch, rows), groups))
        except BaseException:  # such as a signal: what is still being asked is not waited for
            self._processes.close()
            raise
        # Join the answers for all prompts: values, first failures, logged numbers and facts.
        values = [value for answer in answers for value in answer["values"]]
        failures: Counter[str] = Counter()
        texts: dict[str, str] = {}
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        for rows, answer in zip(groups, answers, strict=True):
            for kind, (n_completions, text) in answer["failures"].items():
                failures[kind] += n_completions
                texts.setdefault(kind, text)
            for name, logged in answer.get("metrics", {}).items():
                metrics.setdefault(name, []).extend(logged)
            for name, facts in answer.get("extra", {}).items():
                extra.setdefault(name, [None] * len(values))[rows] = facts
        return RewardValues(
            values=np.array(values, np.float32),
            failures=dict(failures),
            said=texts,
            metrics=metrics,
            extra=extra,
        )

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._processes.close()
        self._threads.shutdown()
        self._processes.close()  # those that a thread started meanwhile

    def _ask(self, function: int, batch: RewardBatch, rows: slice) -> dict[str, Any]:
        """Requests the values of one prompt's completions; an answer may describe a failure."""
        columns = {name: list(values[rows]) for name, values in batch.columns.items()}
        completions: list[Any] = list(batch.completions[rows])
        if batch.chats:  # turns, and those of tools between them
            completions = [list(chat) for chat in batch.chats[rows]]
        elif not isinstance(batch.prompts[rows][0], str):  # a chat
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        keywords = columns | {
            "prompts": list(batch.prompts[rows]),
            "completions": completions,
            "completion_ids": [list(map(int, ids)) for ids in batch.completion_ids[rows]],
        }
        request = (function, keywords, dict(batch.state))
        line = base64.b64encode(pickle.dumps(request)).decode()
        try:
            return json.loads(self._processes.ask(line, self._seconds))
        except NoAnswer as error:
            kind, reason = DIED, str(error)
            if error.late:
                kind = TIMEOUT
                reason = (
                    f"A call took longer than {self._seconds:g} seconds. Increase --reward-timeout."
                )
            n_completions = len(completions)
            return {
                "values": [worker.FAILED] * n_completions,
                "failures": {kind: [n_completions, reason]},
            }
