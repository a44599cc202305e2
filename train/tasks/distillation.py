"""The task of distillation: a user's prompts, whose completions a teacher judges."""

import dataclasses

from lora_jax.training.layout import Layout
from lora_jax.training.losses import ONLINE, Loss, rollout_loss
from train.console.errors import UserError, flag
from train.live import distillation
from train.live.prompts import PromptFeed
from train.options.scripts.distill import Config
from train.run.pretrained import ModelInfo
from train.run.task import Data, Task, TaskRows
from train.tasks import prompts


def check(config: Config) -> None:
    """Raises a UserError for prompts that would be held out for no measure."""
    held_out = {
        "eval_questions": config.run.eval_questions,
        "eval_dataset": config.data.eval_dataset,
    }
    for name, value in held_out.items():
        if value:
            raise UserError(
                f"{flag(name)} {value}: a teacher gives no score to measure on held-out prompts. "
                "Leave it out"
            )


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the prompts, and the batches that a teacher's judgement of completions makes."""
    train, _ = prompts.read_prompts(config.data, rows, outline)
    teacher = distillation.teacher_outline(config.data, outline)
    distillation.teacher_prompts(config.data, train, teacher)
    feed = PromptFeed(
        config,
        train,
        outline,
        per_token=("old", "advantages"),
        per_completion=(),
        sequence_parts=prompts.sequence_parts(config.run.mesh),
        routing=prompts.replayed_routing(config, outline),
    )
    feed, sharing = prompts.share_prompts(feed, [outline, teacher])
    data = config.data
    longer = "" if data.teacher_prompt is None else ", with a longer prompt"
    who = data.teacher_model or data.model
    return prompts.data_of(feed, [f"the teacher is {data.teacher} of {who}{longer}", *sharing])


def loss(config: Config, layout: Layout) -> Loss:
    """Returns the loss of completions whose tokens have advantages."""
    return rollout_loss(
        ONLINE["dapo"],
        temperature=config.data.sampling_temperature,
        entropy=config.optim.updates > 1,
        **layout.chunks(config.optim.loss_chunk),
    )


TASK: Task = dataclasses.replace(
    prompts.TASK,
    defaults=dataclasses.replace(prompts.TASK.defaults, lr=1e-4, full_lr=1e-5, eval_questions=0),
    check=check,
    examples=examples,
    loss=loss,
    evaluation=lambda context: None,
    prepare=distillation.prepare,
    score=None,
    watched={
        "reverse_kl": "how much likelier completions are to the student than to the teacher, in "
        "nats a token; it should fall",
        **prompts.SAMPLER,
    },
    baselines=lambda scores: {},
)
