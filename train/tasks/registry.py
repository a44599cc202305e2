"""Tasks by the data that they train on. A task is imported only when it is requested."""

import importlib
from collections.abc import Sequence

from train.console.errors import UserError
from train.options.tasks import CLASSIFY, SFT
from train.tasks.task import Task

CHATS = "train.tasks.chats"  # fine-tunes on a user's chats
STREAMED = "train.tasks.streamed"  # the same, of data larger than memory
TEXTS = "train.tasks.labelled"  # classifies a user's texts
_NAMED = {CHATS: SFT, TEXTS: CLASSIFY}


def find_task(datasets: Sequence[str], kind: str) -> Task:
    """Returns the task of that name, or the task on a user's own rows if there is none.

    Args:
      datasets: the names of the data sets.
      kind: `CHATS`, `STREAMED` or `TEXTS`.

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
