"""The tasks by script and data; a task's module is imported only where it is asked for."""

import importlib
from collections.abc import Callable
from typing import Any

from train.console.errors import UserError
from train.data.files import holds_images, parse_datasets
from train.options.conditions import DatasetFacts

# The tasks that --dataset names, each with rows and a test of its own.
NAMED: dict[str, dict[str, str]] = {
    "train.sft": {"sql": "train.tasks.sql:TASK"},
    "train.classify": {"vader": "train.tasks.vader:TASK"},
    "train.dpo": {"sql": "train.tasks.sql:PAIRS"},
    "train.grpo": {
        "sql": "train.tasks.sql:REWARDS",
        "arithmetic": "train.tasks.arithmetic:TASK",
        "guess": "train.tasks.guess:TASK",
    },
    "train.distill": {"sql": "train.tasks.sql:DISTILLATION"},
}
_WITH_TOOLS = ("guess",)  # those whose completions call tools without being asked to


def _classifier(data: Any) -> str:
    """Returns the task of a classifier on a user's own rows."""
    if data.labels == "pairs":
        return "train.tasks.reward_model:TASK"
    module = "images" if holds_images(data.image, data.dataset) else "labelled"
    return f"train.tasks.{module}:TASK"


# The task on a user's own rows, from the options on data.
OWN_ROWS: dict[str, Callable[[Any], str]] = {
    "train.sft": lambda data: f"train.tasks.{'stream' if data.stream else 'chats'}:TASK",
    "train.classify": _classifier,
    "train.dpo": lambda data: "train.tasks.pairs:TASK",
    "train.grpo": lambda data: "train.tasks.prompts:TASK",
    "train.distill": lambda data: "train.tasks.distillation:TASK",
}
# Those that refuse, with a reason of their own, the name of a task beside them.
_EXCLUSIVE_TASKS = (
    "train.tasks.stream:TASK",
    "train.tasks.reward_model:TASK",
    "train.tasks.images:TASK",
)


def find_task(script: str, data: Any) -> Any:
    """Returns the `train.run.task.Task` that --dataset names, or the one on a user's own rows.

    Args:
      script: the module of a script: "train.sft".
      data: its options on data.

    Raises:
      UserError: a task is named beside other data.
    """
    names = _dataset_names(data)
    task_on_own_rows = OWN_ROWS[script](data)
    named_tasks = {} if task_on_own_rows in _EXCLUSIVE_TASKS else NAMED[script]
    for task_name in names:
        if task_name in named_tasks and len(names) > 1:
            others = " ".join(name for name in names if name != task_name)
            raise UserError(
                f"--dataset {task_name} is a task with rows and a test of its own: leave out "
                f"{others}"
            )
    module, _, attribute = named_tasks.get(names[0], task_on_own_rows).partition(":")
    return getattr(importlib.import_module(module), attribute)


def dataset_facts(options: Any) -> DatasetFacts:
    """Returns the facts about the data sets that the options of a script name."""
    data = options.data
    names = _dataset_names(data)
    return DatasetFacts(
        names=names,
        has_own_rows=any(names[0] in tasks for tasks in NAMED.values()),
        holds_images=hasattr(data, "image") and holds_images(data.image, names[0]),
        calls_tools=names[0] in _WITH_TOOLS,
    )


def _dataset_names(data: Any) -> list[str]:
    """Returns the names in --dataset."""
    if isinstance(data.dataset, str):
        return [data.dataset]
    return [dataset.name for dataset in parse_datasets(data.dataset)]
