"""Prepares adjustments of logits in the host's memory while the device computes the logits."""

from collections.abc import Mapping

import numpy as np

from lora_jax.models.sampling.adjust import (
    Adjustments,
    neutral_adjustments,
    pack_mask,
    remove_tokens,
)
from train.serve.engine.jobs import ActiveCompletion
from train.serve.protocol.limits import MOST_BIASES, NO_PENALTIES, Grammar, TokenConstraint


class RowAdjuster:
    """Makes the logit adjustments of completions that need them, such as penalties or limits."""

    def __init__(self, vocab: int, length: int) -> None:
        """Stores the vocabulary's size and the maximum number of tokens of a sequence."""
        self._vocab = vocab
        self._max_length = length

    def neutral(self, n_rows: int) -> Adjustments[np.ndarray]:
        """Returns adjustments that change nothing."""
        return neutral_adjustments(n_rows, self._vocab, length=self._max_length, biases=MOST_BIASES)

    def adjustments(
        self, completions: Mapping[int, ActiveCompletion], n_rows: int
    ) -> Adjustments[np.ndarray] | None:
        """Returns the adjustments of n rows; None if no completion needs adjustments.

        A completion that no token may follow has a `problem` from now on.

        Args:
          completions: completions by their rows.
          n_rows: number of rows.
        """
        adjusted_completions: dict[int, ActiveCompletion] = {}
        masked_completions: dict[int, ActiveCompletion] = {}
        for row, completion in completions.items():
            if completion.job.request.is_adjusted:
                adjusted_completions[row] = completion
                if completion.job.request.limits.masks:
                    masked_completions[row] = completion
        if not adjusted_completions:
            return None
        adjustments = self.neutral(n_rows)
        for row, completion in adjusted_completions.items():
            self._fill_row(adjustments, row, completion)
        for row, completion in masked_completions.items():
            self._restrict_mask(adjustments.allowed[row], completion)
        _apply_grammars(masked_completions, adjustments.allowed)
        for row, completion in masked_completions.items():
            if not np.any(adjustments.allowed[row]):
                completion.problem = (
                    f"after {len(completion.ids)} tokens no token may follow, because the "
                    "grammar and the limits of the request allow none. Relax them."
                )
        return adjustments

    def _fill_row(
        self, adjustments: Adjustments[np.ndarray], row: int, completion: ActiveCompletion
    ) -> None:
        """Writes biases, penalties and min_p of a row, in the host's memory."""
        request = completion.job.request
        adjustments.min_p[row] = request.min_p
        biased_ids = np.fromiter(request.limits.biases, np.int32)
        adjustments.bias_ids[row, : len(biased_ids)] = biased_ids
        adjustments.biases[row, : len(biased_ids)] = [*request.limits.biases.values()]
        if request.penalties == NO_PENALTIES:
            return
        adjustments.repetition[row] = request.penalties.repetition
        adjustments.frequency[row] = request.penalties.frequency
        adjustments.presence[row] = request.penalties.presence
        tokens = [*request.prompt, *completion.ids]
        adjustments.tokens[row, : len(tokens)] = tokens
        adjustments.n_prompt[row] = len(request.prompt)

    def _restrict_mask(self, mask: np.ndarray, completion: ActiveCompletion) -> None:
        """Restricts a row's mask, [words] uint32, by its request's limits except a grammar."""
        limits = completion.job.request.limits
        if limits.allowed is not None:
            if completion.allowed_mask is None:
                completion.allowed_mask = pack_mask(limits.allowed, self._vocab)
            mask &= completion.allowed_mask
        banned_ids = [
            bad_word[-1] for bad_word in limits.bad if _ends_with(completion.ids, bad_word[:-1])
        ]
        if len(completion.ids) < limits.min_tokens:
            banned_ids.extend(limits.ends)
        if banned_ids:
            remove_tokens(mask, banned_ids)


def _apply_grammars(completions: Mapping[int, ActiveCompletion], masks: np.ndarray) -> None:
    """Restricts masks, [rows, words] uint32, to what the completions' grammars allow next."""
    constraints: dict[int, TokenConstraint] = {}
    grammar: Grammar | None = None
    for row, completion in completions.items():
        if completion.constraint is not None:
            constraints[row] = completion.constraint
            grammar = completion.job.request.limits.grammar
    if grammar is not None:  # any grammar fills the masks of all constraints
        grammar.fill(constraints, masks)


def _ends_with(ids: list[int], suffix: tuple[int, ...]) -> bool:
    """Returns True if the last tokens are those of a suffix, which may be empty."""
    return not suffix or tuple(ids[-len(suffix) :]) == suffix
