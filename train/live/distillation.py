"""Rollouts that a teacher judges, token by token: the batches of `train.distill`."""

import dataclasses

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
from train.live.rollouts import Rollouts
from train.options.scripts.distill import BASE, DistillDataConfig
from train.reporters.contract import Sample
from train.run.pretrained import ModelInfo, check_weights, read_model, read_model_info
from train.run.task import Data, ModelContext


def prepare(of: ModelContext) -> tuple[TrainingStart, Data]:
    """Returns the start of training, with a teacher that judges its rollouts, and its data."""
    return dataclasses.replace(of.ready, live=DistillationRollouts(of)), of.data


def teacher_outline(data: DistillDataConfig, outline: ModelInfo) -> ModelInfo:
    """Returns the outline of the teacher's base, checked against the student's; reads no weights.

    Raises:
      UserError: it has another tokenizer, or --teacher does not fit it.
    """
    teacher = outline
    if data.teacher_model is not None:
        teacher = read_model_info(data.teacher_model, data.tokenizer, "--teacher-model")
        teacher = teacher.with_template(data.chat_template).dated(data.template_date, optional=True)
    if teacher.tokenizer.get_vocab() != outline.tokenizer.get_vocab():
        raise UserError(
            f"--teacher-model {teacher.name}: its tokenizer is not that of {outline.name}, and it "
            "cannot judge the same tokens; take a model of the same family"
        )
    if data.teacher != BASE:
        find_adapter(data.teacher, "--teacher").check(teacher)
    return teacher


def teacher_prompts(
    data: DistillDataConfig, prompts: TokenizedPrompts, outline: ModelInfo
) -> TokenizedPrompts:
    """Returns prompts as the teacher sees them.

    Raises:
      UserError: one is too long for the teacher.
    """
    if (text := data.teacher_prompt) is None:
        return prompts
    rows = [_add_text(text, row, outline) for row in prompts.rows]
    tokenized = TokenizedPrompts(
        rows, tokenize_prompts(rows, outline.tokenizer, "the teacher's prompts")
    )
    outline.check_length(tokenized.longest + data.max_new_tokens, "--teacher-prompt")
    return tokenized


def _add_text(text: str, row: Row, outline: ModelInfo) -> Row:
    """Returns a row with a text before its prompt: a turn of the system, or plain text."""
    name = "messages" if row.get("messages") else "prompt"
    asked = row[name]
    if isinstance(asked, str):
        if outline.tokenizer.chat_template is None:
            return {**row, name: f"{text}{asked}"}
        asked = [{"role": "user", "content": asked}]
    return {**row, name: [{"role": "system", "content": text}, *asked]}


class DistillationRollouts(Rollouts):
    """Judges each token by how much likelier the teacher finds it than the student."""

    def __init__(self, of: ModelContext) -> None:
        """Reads the teacher.

        Raises:
          UserError: it cannot be read, or does not fit the student.
        """
        super().__init__(of)
        data, optim = of.config.data, of.config.optim
        outline = teacher_outline(data, of.outline)
        self._prompts = teacher_prompts(data, self.feed.prompts, outline)
        self._widths = self.feed.widths_of(self._prompts)
        self._layout, model, params = of.layout, of.model, of.plain
        if data.teacher_model is None and (of.config.adapter.full or of.takes_from_base):
            raise UserError(
                f"--teacher {data.teacher}: the base itself changes while training; name it with "
                f"--teacher-model {outline.name} as well, to have it in memory twice"
            )
        if data.teacher_model is not None:
            layout = Layout.of(of.layout.mesh, outline.config)
            form = of.layout.collective_matmul
            self._layout = dataclasses.replace(layout, collective_matmul=form)
            tell(of.console, f"reading the weights of the teacher, {outline.name}")
            model, params = read_model(
                outline.name,
                dtype=optim.dtype,
                option=outline.option,
                attention=optim.attention,
                sharding=self._layout.of_parameter,
            )
            check_weights(outline, params)
        if data.teacher != BASE:
            params = find_adapter(data.teacher, "--teacher").load(outline, params, outline.name)
        self._params: Tree = params
        self._teacher = self.scorer(model, self._layout)

    def score(
        self, params: Tree, rows: np.ndarray, drawn: GroupedCompletions, number: int
    ) -> tuple[GroupedCompletions, HostBatch, dict[str, float | None]]:
        """Returns an advantage for each token, and log-probabilities."""
        batch = self.feed.batch_from_completions(rows, drawn)
        old, entropy = self.log_probabilities(params, batch)
        shown = self.feed.batch_from_completions(rows, drawn, self._prompts, self._widths)
        theirs, _ = self.log_probabilities(self._params, shown, self._teacher, replays=False)
        counted = batch["weights"] > 0
        gain = np.where(counted, theirs - old, 0.0).astype(np.float32)
        group = self.config.data.group
        asked = map(self.feed.prompts.shown, np.repeat(rows, group).tolist())
        self.feed.newest = [*map(Sample, asked, drawn.texts.ravel().tolist())]
        n = int(counted.sum())
        sums = {"reverse_kl": -gain.sum(), "entropy": entropy[counted].sum()}
        metrics = {name: float(total / n) if n else None for name, total in sums.items()}
        batch |= {"old": old, "advantages": self.config.optim.coefficient * gain}
        return drawn, batch, metrics
