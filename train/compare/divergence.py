"""The exact KL divergence of runs from the base, per token of completions of held-out prompts.

The base draws a completion of each prompt, once. On these, KL(base ‖ trained) is summed over the
whole vocabulary at each token, and averaged over tokens. Forgetting follows this figure on the new
task (Shenfeld et al., arXiv 2509.04259).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Forward, Tree
from lora_jax.models import generate
from lora_jax.models.sampling.prompts import pad_left
from train.run.pretrained import ModelInfo, end_tokens
from train.run.task import EvaluatedModel, Evaluation, EvaluationContext, Progress, Task

KL = "kl"  # its name beside the scores of a run
_MAX_BATCH_ROWS = 8  # in memory at once
_MAX_BATCH_BYTES = 2**28  # of their log-probabilities
_MAX_TOTAL_BYTES = 2**30  # of all log-probabilities of the base: prompts beyond are left out
_SEED = 0


class _PromptRows(NamedTuple):
    """Rows of prompts with their completions, and the base's log-probabilities.

    Attributes:
      ids, segment_ids: int32 [rows, tokens].
      predict_at: int32 [rows, new tokens], the indices that predict the completions' tokens.
      is_completion: bool, likewise: the tokens of the completions.
      base_log_probs: fp32 [rows, new tokens, vocabulary].
    """

    ids: np.ndarray
    segment_ids: np.ndarray
    predict_at: np.ndarray
    is_completion: np.ndarray
    base_log_probs: np.ndarray


@dataclasses.dataclass
class BaseDivergence:
    """The base's completions, on which divergences are measured; empty before `read`.

    Attributes:
      batches: the completions.
      measured_on: the prompts that they complete, in words.
    """

    batches: list[_PromptRows] = dataclasses.field(default_factory=list)
    measured_on: str | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens over which the divergence is averaged."""
        return int(sum(batch.is_completion.sum() for batch in self.batches))

    def read(
        self,
        evaluated: EvaluatedModel,
        outline: ModelInfo,
        prompts: Sequence[list[int]],
        new_tokens: int,
    ) -> None:
        """Draws completions by the base at temperature 1, and keeps its log-probabilities.

        Args:
          evaluated: the base.
          outline: the model's.
          prompts: the tokens of each.
          new_tokens: the maximum number of tokens of a completion.
        """
        model, params, forward = evaluated
        config: Any = outline.config
        # Limit the prompts and the batch by the bytes of the base's log-probabilities.
        prompt_bytes = 4 * new_tokens * config.vocab_size
        read_prompts = prompts[: max(1, _MAX_TOTAL_BYTES // prompt_bytes)]
        self.measured_on = f"the {len(prompts)} held-out prompts"
        if len(read_prompts) < len(prompts):
            self.measured_on = f"the first {len(read_prompts)} of {self.measured_on}"
        n_rows = min(_MAX_BATCH_ROWS, len(read_prompts), max(1, _MAX_BATCH_BYTES // prompt_bytes))
        # Draw and score one batch at a time.
        prompt_tokens = max(map(len, read_prompts))
        eos_ids = end_tokens(outline)
        for start in range(0, len(read_prompts), n_rows):
            batch_prompts = read_prompts[start : start + n_rows]
            n_real = len(batch_prompts)
            # The last batch is filled up to the size of the others.
            padding_prompts = [batch_prompts[0]] * (n_rows - n_real)
            row_prompts = [*batch_prompts, *padding_prompts]
            prompt_ids, prompt_mask = pad_left(
                row_prompts, prompt_tokens, eos_ids[0] if eos_ids else 0
            )
            completions = generate(
                model,
                params,
                prompt_ids,
                prompt_mask,
                max_new_tokens=new_tokens,
                eos_token_id=eos_ids or None,
                temperature=1.0,
                key=jax.random.key(_SEED + start),
                apply=forward,
            )
            ids, segment_ids, predict_at, is_completion = _make_row_arrays(
                row_prompts, np.asarray(completions), eos_ids, prompt_tokens, n_real
            )
            log_probs = _log_probabilities(forward, params, ids, segment_ids, predict_at)
            self.batches.append(
                _PromptRows(
                    ids=ids,
                    segment_ids=segment_ids,
                    predict_at=predict_at,
                    is_completion=is_completion,
                    base_log_probs=np.asarray(log_probs),
                )
            )

    def divergence(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Returns the divergence of a model from the base as a metric; {} before `read`."""
        if not self.tokens:
            return {}
        total = 0.0
        for batch in self.batches:
            total += float(_sum_divergence(evaluated.forward, evaluated.params, *batch))
        return {KL: total / self.tokens}

    def measured_in(self, task: Task) -> Task:
        """Returns the task with the divergence added to its evaluation."""

        def evaluation(context: EvaluationContext) -> Evaluation | None:
            task_evaluation = task.evaluation(context)
            if task_evaluation is None:
                return None
            return _DivergingEvaluation(task_evaluation, self)

        return dataclasses.replace(task, evaluation=evaluation)


@dataclasses.dataclass
class _DivergingEvaluation:
    """Adds the divergence from the base to the scores of another evaluation."""

    plain: Evaluation
    base: BaseDivergence

    def before(self, evaluated: EvaluatedModel) -> None:
        """Evaluates the base, whose divergence from itself is zero."""
        self.plain.before(evaluated)

    def reuse_base_scores(self, other: Evaluation) -> bool:
        """Takes over another run's scores of the base; returns True if that worked."""
        plain = other.plain if isinstance(other, _DivergingEvaluation) else other
        return self.plain.reuse_base_scores(plain)

    def score(self, evaluated: EvaluatedModel, progress: Progress) -> dict[str, float]:
        """Returns the scores and the divergence of an adapted tree."""
        return self.plain.score(evaluated, progress) | self.base.divergence(evaluated)

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Evaluates the trained model."""
        return self.plain.after(evaluated) | self.base.divergence(evaluated)


def _make_row_arrays(
    prompts: Sequence[list[int]],
    completions: np.ndarray,
    eos_ids: Sequence[int],
    prompt_tokens: int,
    n_real: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the ids, segment ids, indices and mask of a `_PromptRows`.

    Args:
      prompts: the tokens of each prompt.
      completions: the tokens drawn, [rows, new tokens].
      eos_ids: tokens that end a completion.
      prompt_tokens: the tokens of the longest prompt.
      n_real: the number of rows that count; the others fill the batch up.
    """
    new_tokens = completions.shape[1]
    ids = np.zeros((len(prompts), prompt_tokens + new_tokens), np.int32)
    segment_ids = np.zeros_like(ids)
    predict_at = np.zeros(completions.shape, np.int32)
    is_completion = np.zeros(completions.shape, bool)
    for row, (prompt, tokens) in enumerate(zip(prompts, completions.tolist(), strict=True)):
        # A completion ends with its first end token.
        ends = [end for end, token in enumerate(tokens, start=1) if token in eos_ids]
        n_tokens = ends[0] if ends else new_tokens
        sequence = [*prompt, *tokens[:n_tokens]]
        ids[row, : len(sequence)] = sequence
        segment_ids[row, : len(sequence)] = 1
        predict_at[row, :n_tokens] = np.arange(len(prompt) - 1, len(sequence) - 1)
        is_completion[row, :n_tokens] = row < n_real
    return ids, segment_ids, predict_at, is_completion


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(
    forward: Forward, params: Tree, ids: jax.Array, segment_ids: jax.Array, predict_at: jax.Array
) -> jax.Array:
    """Returns log-probabilities of next tokens, fp32 [rows, n, vocabulary]."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    logits = forward(
        {"params": params}, ids, positions=positions, segment_ids=segment_ids, logits_at=predict_at
    )
    return jax.nn.log_softmax(logits.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _sum_divergence(
    forward: Forward,
    params: Tree,
    ids: jax.Array,
    segment_ids: jax.Array,
    predict_at: jax.Array,
    is_completion: jax.Array,
    base_log_probs: jax.Array,
) -> jax.Array:
    """Returns the sum of KL(base ‖ model) over the tokens that count."""
    log_probs = _log_probabilities(forward, params, ids, segment_ids, predict_at)
    divergences = jnp.sum(jnp.exp(base_log_probs) * (base_log_probs - log_probs), axis=-1)
    return jnp.sum(jnp.where(is_completion, divergences, 0.0))
