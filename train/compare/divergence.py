"""Divergence of runs from the base: exactly, by the next token, on held-out prompts.

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
_ROWS, _PART = 8, 2**28  # rows in memory at once, and bytes of their log-probabilities, at most
_HELD = 2**30  # bytes of all log-probabilities of the base, at most: prompts are left out beyond
_SEED = 0


class _PromptRows(NamedTuple):
    """Rows of prompts with their completions, and the base's log-probabilities.

    Attributes:
      ids, segment_ids: int32 [rows, tokens].
      at: int32 [rows, new tokens], the places that predict the completions' tokens.
      counted: bool, likewise: the tokens of the completions.
      base: fp32 [rows, new tokens, vocabulary].
    """

    ids: np.ndarray
    segment_ids: np.ndarray
    at: np.ndarray
    counted: np.ndarray
    base: np.ndarray


@dataclasses.dataclass
class BaseDivergence:
    """The completions of the base; knows none until `read`.

    Attributes:
      parts: the completions.
      measured_on: the prompts that they complete, in words.
    """

    parts: list[_PromptRows] = dataclasses.field(default_factory=list)
    measured_on: str | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens that the divergence is averaged over."""
        return int(sum(part.counted.sum() for part in self.parts))

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
        of_prompt = 4 * new_tokens * config.vocab_size
        chosen = prompts[: max(1, _HELD // of_prompt)]
        at_once = min(_ROWS, len(chosen), max(1, _PART // of_prompt))
        self.measured_on = f"the {len(prompts)} held-out prompts"
        if len(chosen) < len(prompts):
            self.measured_on = f"the first {len(chosen)} of {self.measured_on}"
        length, ends = max(map(len, chosen)), end_tokens(outline)
        for first in range(0, len(chosen), at_once):
            rows = chosen[first : first + at_once]
            padded = [*rows, *[rows[0]] * (at_once - len(rows))]
            drawn = generate(
                model,
                params,
                *pad_left(padded, length, ends[0] if ends else 0),
                max_new_tokens=new_tokens,
                eos_token_id=ends or None,
                temperature=1.0,
                key=jax.random.key(_SEED + first),
                apply=forward,
            )
            arrays = _arrays(padded, np.asarray(drawn), ends, length, len(rows))
            base = np.asarray(_log_probabilities(forward, params, *arrays[:3]))
            self.parts.append(_PromptRows(*arrays, base))

    def divergence(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Returns the divergence of a model from the base by its name; {} where none was read."""
        if not self.tokens:
            return {}
        forward, params = evaluated.forward, evaluated.params
        sums = (float(_divergence(forward, params, *part)) for part in self.parts)
        return {KL: sum(sums) / self.tokens}

    def measured_in(self, task: Task) -> Task:
        """Returns a task whose scores have the divergence beside them."""

        def evaluation(context: EvaluationContext) -> Evaluation | None:
            plain = task.evaluation(context)
            return None if plain is None else _DivergingEvaluation(plain, self)

        return dataclasses.replace(task, evaluation=evaluation)


@dataclasses.dataclass
class _DivergingEvaluation:
    """Scores as another evaluation does, with the divergence from the base beside them."""

    plain: Evaluation
    base: BaseDivergence

    def before(self, evaluated: EvaluatedModel) -> None:
        """Evaluates the base, which does not diverge from itself."""
        self.plain.before(evaluated)

    def reuse_base_scores(self, other: Evaluation) -> bool:
        """Takes another run's measures of the base."""
        plain = other.plain if isinstance(other, _DivergingEvaluation) else other
        return self.plain.reuse_base_scores(plain)

    def score(self, evaluated: EvaluatedModel, progress: Progress) -> dict[str, float]:
        """Returns the scores of an adapted tree, and its divergence."""
        return self.plain.score(evaluated, progress) | self.base.divergence(evaluated)

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Evaluates the trained model."""
        return self.plain.after(evaluated) | self.base.divergence(evaluated)


def _arrays(
    prompts: Sequence[list[int]], drawn: np.ndarray, ends: Sequence[int], length: int, n_real: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the arrays of a `_PromptRows`; only the first so many rows count."""
    new = drawn.shape[1]
    ids = np.zeros((len(prompts), length + new), np.int32)
    segment_ids, counted = np.zeros_like(ids), np.zeros(drawn.shape, bool)
    at = np.zeros(drawn.shape, np.int32)
    for row, (prompt, tokens) in enumerate(zip(prompts, drawn.tolist(), strict=True)):
        n = next((i for i, token in enumerate(tokens, start=1) if token in ends), new)
        whole = [*prompt, *tokens[:n]]
        ids[row, : len(whole)], segment_ids[row, : len(whole)] = whole, 1
        at[row, :n] = np.arange(len(prompt) - 1, len(whole) - 1)
        counted[row, :n] = row < n_real
    return ids, segment_ids, at, counted


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(
    forward: Forward, params: Tree, ids: jax.Array, segment_ids: jax.Array, at: jax.Array
) -> jax.Array:
    """Returns log-probabilities of next tokens, fp32 [rows, n, vocabulary]."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    logits = forward(
        {"params": params}, ids, positions=positions, segment_ids=segment_ids, logits_at=at
    )
    return jax.nn.log_softmax(logits.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _divergence(
    forward: Forward,
    params: Tree,
    ids: jax.Array,
    segment_ids: jax.Array,
    at: jax.Array,
    counted: jax.Array,
    base: jax.Array,
) -> jax.Array:
    """Returns the sum of KL(base ‖ model) over the tokens that count."""
    trained = _log_probabilities(forward, params, ids, segment_ids, at)
    apart = jnp.sum(jnp.exp(base) * (base - trained), axis=-1)
    return jnp.sum(jnp.where(counted, apart, 0.0))
