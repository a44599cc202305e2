"""Rollouts that a teacher judges, token by token: the batches of `train.distill`."""

import dataclasses
from typing import Any

import numpy as np

from lora_jax.core.types import Tree
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.data.pairs import tokenize_prompts
from lora_jax.training.data.rows import Row
from lora_jax.training.layout import Layout
from lora_jax.training.ready import TrainingStart
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.console.output import tell
from train.live.prompts import GroupedCompletions, TokenizedPrompts
from train.live.records import make_samples
from train.live.rollouts import Rollouts
from train.options.scripts.distill import BASE, DistillDataConfig
from train.run.pretrained import ModelInfo, check_weights, read_model, read_model_info
from train.run.task import Data, ModelContext


def prepare(context: ModelContext) -> tuple[TrainingStart, Data]:
    """Returns the start of training, with a teacher that judges its rollouts, and its data."""
    return dataclasses.replace(context.ready, live=DistillationRollouts(context)), context.data


def teacher_outline(data: DistillDataConfig, outline: ModelInfo) -> ModelInfo:
    """Reads the outline of the teacher's base, and checks it against the student's outline.

    Raises:
      UserError: the teacher has another tokenizer, or --teacher does not fit it.
    """
    teacher = outline
    if data.teacher_model is not None:
        teacher = read_model_info(data.teacher_model, data.tokenizer, "--teacher-model")
        teacher = teacher.with_template(data.chat_template).dated(data.template_date, optional=True)
    if teacher.tokenizer.get_vocab() != outline.tokenizer.get_vocab():
        raise UserError(
            f"--teacher-model {teacher.name} has a different tokenizer than {outline.name}, so it "
            "cannot rate the same tokens. Pass a model of the same family."
        )
    if data.teacher != BASE:
        find_adapter(data.teacher, "--teacher").check(teacher)
    return teacher


def teacher_prompts(
    data: DistillDataConfig, prompts: TokenizedPrompts, outline: ModelInfo
) -> TokenizedPrompts:
    """Returns the prompts with --teacher-prompt before each of them.

    Raises:
      UserError: a prompt is too long for the teacher.
    """
    if data.teacher_prompt is None:
        return prompts
    rows = [_add_text(data.teacher_prompt, row, outline) for row in prompts.rows]
    tokens = tokenize_prompts(rows, outline.tokenizer, "the teacher's prompts")
    tokenized = TokenizedPrompts(rows, tokens)
    outline.check_length(tokenized.longest + data.max_new_tokens, "--teacher-prompt")
    return tokenized


def _add_text(text: str, row: Row, outline: ModelInfo) -> Row:
    """Returns a row with a text before its prompt: a turn of the system, or plain text."""
    field = "messages" if row.get("messages") else "prompt"
    prompt = row[field]
    is_plain_text = isinstance(prompt, str) and outline.tokenizer.chat_template is None
    if is_plain_text:
        return {**row, field: f"{text}{prompt}"}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {**row, field: [{"role": "system", "content": text}, *turns]}


class DistillationRollouts(Rollouts):
    """Rates each token by log p of the teacher minus log p of the student."""

    def __init__(self, context: ModelContext) -> None:
        """Reads the teacher.

        Raises:
          UserError: the teacher cannot be read, or does not fit the student.
        """
        super().__init__(context)
        data = context.config.data
        outline = teacher_outline(data, context.outline)
        self._prompts = teacher_prompts(data, self.feed.prompts, outline)
        self._widths = self.feed.widths_of(self._prompts)
        if data.teacher_model is None:
            base_changes = context.config.adapter.full or context.takes_from_base
            if base_changes:
                raise UserError(
                    f"--teacher {data.teacher} needs the base, but training changes the base "
                    f"itself. Pass --teacher-model {outline.name} to hold the base in memory twice."
                )
            self._layout = context.layout
            model = context.model
            params = context.plain
        else:
            self._layout = _teacher_layout(context, outline)
            model, params = _read_teacher(context, outline, self._layout)
        if data.teacher != BASE:
            params = find_adapter(data.teacher, "--teacher").load(outline, params, outline.name)
        self._params: Tree = params
        self._teacher = self.scorer(model, self._layout)

    def score(
        self, params: Tree, rows: np.ndarray, drawn: GroupedCompletions, number: int
    ) -> tuple[GroupedCompletions, HostBatch, dict[str, float | None]]:
        """Returns the batch with an advantage and a log-probability for each token."""
        batch = self.feed.batch_from_completions(rows, drawn)
        student_logps, entropy = self.log_probabilities(params, batch)
        teacher_batch = self.feed.batch_from_completions(rows, drawn, self._prompts, self._widths)
        teacher_logps, _ = self.log_probabilities(
            self._params, teacher_batch, self._teacher, replays=False
        )
        # [accumulate, batch, tokens]
        has_loss = batch["weights"] > 0
        log_ratio = np.where(has_loss, teacher_logps - student_logps, 0.0).astype(np.float32)
        batch["old"] = student_logps
        batch["advantages"] = self.config.optim.coefficient * log_ratio

        self.feed.new_samples = make_samples(self.feed, rows, drawn, batch["weights"])
        n_tokens = int(has_loss.sum())
        if n_tokens == 0:
            return drawn, batch, {"reverse_kl": None, "entropy": None}
        metrics: dict[str, float | None] = {
            "reverse_kl": float(-log_ratio.sum() / n_tokens),
            "entropy": float(entropy[has_loss].sum() / n_tokens),
        }
        return drawn, batch, metrics


def _teacher_layout(context: ModelContext, outline: ModelInfo) -> Layout:
    """Returns the placement of --teacher-model on the run's mesh."""
    layout = Layout.of(context.layout.mesh, outline.config)
    return dataclasses.replace(layout, collective_matmul=context.layout.collective_matmul)


def _read_teacher(context: ModelContext, outline: ModelInfo, layout: Layout) -> tuple[Any, Tree]:
    """Returns the teacher's base, and its parameters on the mesh."""
    optim = context.config.optim
    tell(context.console, f"reading the weights of the teacher, {outline.name}")
    model, params = read_model(
        outline.name,
        dtype=optim.dtype,
        option=outline.option,
        attention=optim.attention,
        sharding=layout.of_parameter,
    )
    check_weights(outline, params)
    return model, params
