"""Tasks by the data that they train on; a module is imported only where its task is asked for."""

import importlib
from collections.abc import Sequence
from typing import Any

from train.console.errors import UserError

# The tasks that --dataset names, each with rows and a test of its own.
SFT = {"sql": "train.tasks.sql.task"}
CLASSIFY = {"vader": "train.tasks.vader"}
DPO = {"sql": "train.tasks.sql.pairs"}
GRPO = {"sql": "train.tasks.sql.rewarded", "arithmetic": "train.tasks.sums"}

DISTILL = {"sql": "train.tasks.sql.taught"}

CHATS = "train.tasks.chats"  # fine-tunes on a user's chats
STREAMED = "train.tasks.stream"  # the same, of data larger than memory
TEXTS = "train.tasks.labelled"  # classifies a user's texts
IMAGES = "train.tasks.images"  # classifies a user's images
SCORES = "train.tasks.reward_model"  # scores completions, by a user's preferences
PAIRS = "train.tasks.pairs"  # trains on a user's preferences
PROMPTS = "train.tasks.prompts"  # trains on rewards of completions of a user's prompts
TAUGHT = "train.tasks.distillation"  # trains on a teacher's judgement of such completions
_NAMED = {CHATS: SFT, TEXTS: CLASSIFY, PAIRS: DPO, PROMPTS: GRPO, TAUGHT: DISTILL}


def find_task(datasets: Sequence[str], kind: str) -> Any:
    """Returns the `train.run.task.Task` of a name, or the one on a user's own rows.

    Args:
      datasets: the names of the data sets.
      kind: `CHATS`, `STREAMED`, `TEXTS`, `IMAGES`, `SCORES`, `PAIRS`, `PROMPTS` or `TAUGHT`.

    Raises:
      UserError: a task is named beside other data.
    """
    tasks = _NAMED.get(kind, {})
    if len(datasets) > 1 and (alone := [name for name in datasets if name in tasks]):
        raise UserError(
            f"--dataset {alone[0]} is a task with rows and a test of its own: leave out "
            f"{' '.join(name for name in datasets if name != alone[0])}"
        )
    return importlib.import_module(tasks.get(datasets[0], kind)).TASK
