"""The tasks that `--dataset` names, each with rows and a test of its own."""

import importlib
from typing import Any

# The modules of the tasks, by their names; one is imported only where its task is asked for.
SFT = {"sql": "train.tasks.sql.task"}
CLASSIFY = {"vader": "train.tasks.vader"}


def named_task(name: str) -> Any | None:
    """Returns the `train.tasks.task.Task` of a name; None where it is that of other data."""
    module = {**SFT, **CLASSIFY}.get(name)
    return importlib.import_module(module).TASK if module else None
