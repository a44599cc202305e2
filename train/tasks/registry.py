"""Tasks by the name of their dataset. A task is imported only where it is asked for."""

import importlib

from train.tasks.task import Task

CHATS = "train.tasks.chats"  # fine-tunes on a user's chats
TEXTS = "train.tasks.labelled"  # tells a user's texts apart
_NAMED = {
    CHATS: {"sql": "train.tasks.sql.task"},
    TEXTS: {"vader": "train.tasks.vader"},
}


def find_task(dataset: str, kind: str) -> Task:
    """Returns the task of that name; the one on a user's rows where none has it.

    Args:
      dataset: the option --dataset.
      kind: `CHATS` or `TEXTS`.
    """
    return importlib.import_module(_NAMED[kind].get(dataset, kind)).TASK
