"""The options of `python -m train.distill`."""

import dataclasses

from lora_jax.training.arguments import POSITIVE
from train.console.errors import UserError
from train.console.help import HelpPage
from train.options import field
from train.options.field import option
from train.options.paths import Place, Words
from train.options.scripts import rollouts
from train.options.scripts.rollouts import RolloutDataConfig, RolloutOptimConfig, RolloutOptions
from train.options.scripts.sft import SftAdapterConfig, SftRunConfig

DEFAULT_TASK = "sql"  # of train/settings/tasks.py
BASE = "base"  # a value of --teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillDataConfig(RolloutDataConfig):
    """Model, prompts, completions and teacher."""

    dataset: Place = DEFAULT_TASK
    """The prompts: "sql" (the questions of the SQL task), a file (JSONL, JSON, CSV, TSV, also
    gzipped, or Parquet), a folder of files, a folder that `datasets` saved, or a dataset on the
    hub. Each row has a `prompt` (a text or turns) or `messages`."""
    group: int = 1
    """Number of completions that are drawn for each prompt."""
    teacher: str = option(BASE, field.HIDDEN)
    """The model that rates each token of a completion: base, or the folder of an adapter over the
    base of --teacher-model."""
    teacher_model: str | None = option(None, field.HIDDEN)
    """The base model of the teacher, such as a larger model with the same tokenizer. By default
    --model."""
    teacher_prompt: Words | None = option(None, field.HIDDEN)
    """A text that only the teacher sees before each prompt (as the system's turn of a chat). The
    adapter learns to answer as if it had seen the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptimConfig(RolloutOptimConfig):
    """Optimisation."""

    lr: float | None = None
    """The peak learning rate. By default 1e-4. --full uses a tenth of the default, and --optimizer
    lion a third. sgd has no default."""
    coefficient: float = option(1.0, field.OPTIMISATION)
    """The factor of the teacher's rating of a token, which is log p of the teacher minus log p of
    the student. Its mean over the student's completions is the negative reverse KL divergence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillRunConfig(SftRunConfig):
    """Evaluation and output."""

    output: Place = "runs/distill"
    """The output folder of the run. With --many, it contains the folders of all runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RolloutOptions):
    """Train a language model on its own completions, whose tokens a teacher model rates."""

    HELP = HelpPage(
        "model dataset teacher teacher_model output steps max_new_tokens rank lr resume",
        "--model Qwen/Qwen3-0.6B --teacher-model Qwen/Qwen3-4B --dataset prompts.jsonl --steps 100",
    )

    data: DistillDataConfig = DistillDataConfig()
    adapter: SftAdapterConfig = SftAdapterConfig()
    optim: DistillOptimConfig = DistillOptimConfig()
    run: DistillRunConfig = DistillRunConfig()


def check(config: Config) -> None:
    """Raises a UserError if the options contradict each other, whatever the task is."""
    rollouts.check(config, coefficient=POSITIVE)
    data = config.data
    if (data.teacher, data.teacher_model, data.teacher_prompt) == (BASE, None, None):
        if config.adapter.init_adapter is None:
            raise UserError(
                "The teacher is the base model itself, from which the adapter starts, so there is "
                "nothing to learn. Pass an adapter with --teacher, a larger model with "
                "--teacher-model, or a text that only the teacher sees with --teacher-prompt."
            )
