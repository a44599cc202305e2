"""Tasks by the name of their dataset. A task is imported only when it is requested."""

import importlib

from train.tasks.task import Task

CHATS = "train.tasks.chats"  # fine-tunes on a user's chats
TEXTS = "train.tasks.labelled"  # classifies a user's texts
_NAMED = {
    CHATS: {"sql": "train.tasks.sql.task"},
    TEXTS: {"vader": "train.tasks.vader"},
}


def find_task(dataset: str, kind: str) -> Task:
    """Returns the task of that name, or the task on a user's own rows if there is none.

    Args:
      dataset: the option --dataset.
      kind: `CHATS` or `TEXTS`.
    """
    return importlib.import_module(_NAMED[kind].get(dataset, kind)).TASK
