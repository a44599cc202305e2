"""The task of distillation: a user's prompts, whose completions a teacher rates."""

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
    """Raises a UserError for options that hold out prompts, which no score would measure."""
    held_out = {
        "eval_questions": config.run.eval_questions,
        "eval_dataset": config.data.eval_dataset,
    }
    for name, value in held_out.items():
        if value:
            raise UserError(
                f"{flag(name)} {value} has no effect, because a teacher gives no score of held-out "
                f"prompts. Remove {flag(name)}."
            )


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the prompts, and the feed that draws completions for a teacher to rate."""
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
    teacher_line = f"the teacher is {data.teacher} of {data.teacher_model or data.model}"
    if data.teacher_prompt is not None:
        teacher_line += ", with a longer prompt"
    return prompts.data_of(feed, [teacher_line, *sharing])


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
        "reverse_kl": "log p of the student minus log p of the teacher, in nats per token; it "
        "should fall",
        **prompts.SAMPLER,
    },
    baselines=lambda scores: {},
)
