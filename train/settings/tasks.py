"""Finds the task of a script and its data. A task's module is imported only when it is needed."""

import importlib
from collections.abc import Callable
from typing import Any

from train.console.errors import UserError
from train.data.files import holds_images, parse_datasets
from train.options.conditions import DatasetFacts

# The tasks that --dataset can name, each with its own rows and test.
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
_WITH_TOOLS = ("guess",)  # tasks whose completions call tools without --tools


def _classifier_task(data: Any) -> str:
    """Returns the name of the task that trains a classifier on a user's own rows."""
    if data.labels == "pairs":
        return "train.tasks.reward_model:TASK"
    module = "images" if holds_images(data.image, data.dataset) else "labelled"
    return f"train.tasks.{module}:TASK"


# The task on a user's own rows, from the options on data.
OWN_ROWS: dict[str, Callable[[Any], str]] = {
    "train.sft": lambda data: f"train.tasks.{'stream' if data.stream else 'chats'}:TASK",
    "train.classify": _classifier_task,
    "train.dpo": lambda data: "train.tasks.pairs:TASK",
    "train.grpo": lambda data: "train.tasks.prompts:TASK",
    "train.distill": lambda data: "train.tasks.distillation:TASK",
}
# Tasks that refuse the name of another task in --dataset with their own message.
_EXCLUSIVE_TASKS = (
    "train.tasks.stream:TASK",
    "train.tasks.reward_model:TASK",
    "train.tasks.images:TASK",
)


def find_task(script: str, data: Any) -> Any:
    """Returns the `train.run.task.Task` that --dataset names, or the task for a user's own rows.

    Args:
      script: the module of a script, such as "train.sft".
      data: the script's options about data.

    Raises:
      UserError: a task is named together with other data.
    """
    names = _dataset_names(data)
    task_on_own_rows = OWN_ROWS[script](data)
    named_tasks = {} if task_on_own_rows in _EXCLUSIVE_TASKS else NAMED[script]
    for task_name in names:
        if task_name in named_tasks and len(names) > 1:
            others = " ".join(name for name in names if name != task_name)
            raise UserError(
                f"--dataset {task_name} is a task with its own rows and its own test. Remove "
                f"{others}."
            )
    module, _, attribute = named_tasks.get(names[0], task_on_own_rows).partition(":")
    return getattr(importlib.import_module(module), attribute)


def dataset_facts(options: Any) -> DatasetFacts:
    """Returns the facts about the data sets in --dataset."""
    data = options.data
    names = _dataset_names(data)
    return DatasetFacts(
        names=names,
        has_own_rows=any(names[0] in tasks for tasks in NAMED.values()),
        holds_images=hasattr(data, "image") and holds_images(data.image, names[0]),
        calls_tools=names[0] in _WITH_TOOLS,
    )


def _dataset_names(data: Any) -> list[str]:
    """Returns the names of the data sets in --dataset."""
    if isinstance(data.dataset, str):
        return [data.dataset]
    return [dataset.name for dataset in parse_datasets(data.dataset)]
