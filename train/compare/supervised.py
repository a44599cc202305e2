"""Runs of `train.sft` on right answers, compared by rewards with runs of `train.grpo`.

Such a run trains on the rows of --demonstrations, and is scored as the others are: by the rewards
of its greedy completions of the held-out prompts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from lora_jax.training.data.order import Order
from train import sft
from train.compare.trials import ComparedScript
from train.options.common import Options
from train.options.defaults import Defaults
from train.options.file import replace_options
from train.options.scripts.sft import Config, SftRunConfig
from train.run.task import Evaluation, EvaluationContext, Task
from train.settings.defaults import check_files
from train.stages.inputs import RunData, read_inputs

_OPTIONS_NOT_TAKEN = (  # of `train.sft`, which a run by rewards does not set
    "alpha",
    "lr",
    "dataset",
    "eval_dataset",
    "rows",
    "fields",
    "eval_every",
    "eval_questions",
    "output",
    "loss",
)


class HeldOutPrompts:
    """The held-out prompts of a comparison, which all its runs complete.

    Attributes:
      config: the options of a run by rewards.
      task: its task.
      read: its rows, outline and data.
    """

    def __init__(self, config: Options, task: Task) -> None:
        """Reads the prompts. The caller closes their data.

        Raises:
          UserError: something is missing, or does not fit the model.
        """
        self.config: Any = task.completed(config)
        self.task = task
        self.read: RunData = read_inputs(self.config, task)

    def steps(self, batch_size: int) -> int:
        """Returns the steps of a run by rewards, from its completions per batch."""
        optim = self.config.optim
        if optim.steps is not None:
            return optim.steps
        n_prompts = len(self.read.data.train)
        batch_prompts = max(1, batch_size // self.config.data.group)
        order = Order(optim.seed, n_prompts, batch_prompts, optim.grad_accum)
        return order.steps(optim.epochs) * optim.updates

    def evaluation(self, context: EvaluationContext) -> Evaluation | None:
        """Returns the evaluation of any script's run by the rewards on these prompts."""
        config = replace_options(self.config, {"output": context.config.run.output})
        prompts_context = dataclasses.replace(
            context, config=config, rows=self.read.rows, data=self.read.data
        )
        return self.task.evaluation(prompts_context)


def supervised_script(
    rows: str, prompts: HeldOutPrompts, measured_in: Callable[[Task], Task]
) -> ComparedScript:
    """Returns `train.sft` as a script that a comparison by rewards can run.

    Args:
      rows: the demonstrations, as --dataset of `train.sft` names them.
      prompts: the held-out prompts.
      measured_in: adds further measures to a task.
    """
    defaults = Config()
    config = replace_options(defaults, {"dataset": (rows,)})

    @functools.cache
    def task() -> Task:
        """Returns the task of the demonstrations, evaluated by the rewards."""
        rewarded_task = dataclasses.replace(
            sft.task_of(config),
            score=prompts.task.score,
            evaluation=prompts.evaluation,
            baselines=prompts.task.baselines,
            score_error=prompts.task.score_error,
            question_scores=prompts.task.question_scores,
        )
        return measured_in(rewarded_task)

    def check(config: Any) -> None:
        sft.SCRIPT.check_options(config)
        check_files(config)
        task().check_options(config)

    def with_defaults(options: Any, task_defaults: Defaults) -> Options:
        length = {"steps": prompts.steps(options.optim.batch_size), "epochs": None}
        return sft.SCRIPT.completed(replace_options(options, length), task_defaults)

    return ComparedScript(
        name=sft.SCRIPT.name,
        compared=defaults,
        plain=defaults,
        task_of=lambda config: task(),
        check=check,
        with_defaults=with_defaults,
        quick={},
        quick_full=(),
        every="score_every",
    )


def supervised_options(options: Options, rows: str) -> Config:
    """Converts the options of a run by rewards to options of `train.sft` on demonstrations.

    Args:
      options: the options of `train.grpo`, with the task's defaults.
      rows: the demonstrations.
    """
    changes: dict[str, Any] = {}
    for section in vars(options).values():
        changes |= vars(section)
    for name in _OPTIONS_NOT_TAKEN:
        changes.pop(name, None)
    changes["dataset"] = (rows,)
    return replace_options(Config(run=SftRunConfig(eval_questions=0)), changes)
