"""A user's reward functions, called in processes of their own."""

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
    """Processes that have imported the functions; each answers for the completions of one prompt.

    Attributes:
      needs: the columns that each function cannot do without.
    """

    def __init__(self, specs: Sequence[str], seconds: float, workers: int) -> None:
        """Starts one process, to see that it can import the functions.

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
        self._served = ProgramPool(command, env, copies=workers, greeting_seconds=_IMPORT_SECONDS)
        try:
            greeting = json.loads(self._served.start())
            if "error" in greeting:
                raise UserError(f"--reward {greeting['spec']}: {greeting['error']}")
        except NoAnswer as error:
            raise UserError(f"--reward {' '.join(specs)}: importing it {error}") from error
        except BaseException:
            self._served.close()
            raise
        self.needs: list[list[str]] = greeting["needs"]
        self._threads = ThreadPoolExecutor(workers, "rewards")

    def judge(self, function: int, batch: RewardBatch) -> RewardValues:
        """Calls a function once for each prompt of a batch; returns its values."""
        starts = range(0, len(batch.completions), batch.group)
        parts = [slice(start, start + batch.group) for start in starts]
        try:
            answers = list(self._threads.map(lambda part: self._ask(function, batch, part), parts))
        except BaseException:  # such as a signal: what is still being asked is not waited for
            self._served.close()
            raise
        values = [value for answer in answers for value in answer["values"]]
        failures: Counter[str] = Counter()
        texts: dict[str, str] = {}
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        for part, answer in zip(parts, answers, strict=True):
            for kind, (number, text) in answer["failures"].items():
                failures[kind] += number
                texts.setdefault(kind, text)
            for name, numbers in answer.get("metrics", {}).items():
                metrics.setdefault(name, []).extend(numbers)
            for name, facts in answer.get("extra", {}).items():
                extra.setdefault(name, [None] * len(values))[part] = facts
        return RewardValues(np.array(values, np.float32), dict(failures), texts, {}, metrics, extra)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._served.close()
        self._threads.shutdown()
        self._served.close()  # those that a thread started meanwhile

    def _ask(self, function: int, batch: RewardBatch, part: slice) -> dict[str, Any]:
        columns = {name: list(values[part]) for name, values in batch.columns.items()}
        completions: list[Any] = list(batch.completions[part])
        if batch.chats:  # turns, and those of tools between them
            completions = [list(chat) for chat in batch.chats[part]]
        elif not isinstance(batch.prompts[part][0], str):  # a chat
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        keywords = columns | {
            "prompts": list(batch.prompts[part]),
            "completions": completions,
            "completion_ids": [list(map(int, ids)) for ids in batch.completion_ids[part]],
        }
        asked = (function, keywords, dict(batch.state))
        line = base64.b64encode(pickle.dumps(asked)).decode()
        try:
            return json.loads(self._served.ask(line, self._seconds))
        except NoAnswer as error:
            n = len(completions)
            late = f"a call took longer than {self._seconds:g} seconds, --reward-timeout"
            why = late if error.late else str(error)
            return {
                "values": [worker.FAILED] * n,
                "failures": {TIMEOUT if error.late else DIED: [n, why]},
            }
