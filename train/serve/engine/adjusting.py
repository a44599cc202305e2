"""Adjustments of rows' logits, made in the host's memory while the device computes the logits."""

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
    """Makes the adjustments of completions that ask for some."""

    def __init__(self, vocab: int, length: int) -> None:
        """Takes the size of the vocabulary, and the most tokens of a sequence."""
        self._vocab, self._length = vocab, length

    def neutral(self, rows: int) -> Adjustments[np.ndarray]:
        """Returns adjustments that change nothing."""
        return neutral_adjustments(rows, self._vocab, length=self._length, biases=MOST_BIASES)

    def adjustments(
        self, rows: Mapping[int, ActiveCompletion], n: int
    ) -> Adjustments[np.ndarray] | None:
        """Returns the adjustments of n rows; None where no completion asks for any.

        A completion that no token may follow has a `problem` from now on.

        Args:
          rows: completions by their rows.
          n: number of rows.
        """
        adjusted = {place: row for place, row in rows.items() if row.job.request.is_adjusted}
        if not adjusted:
            return None
        made = self.neutral(n)
        for place, row in adjusted.items():
            self._fill(made, place, row)
        masked = {place: row for place, row in adjusted.items() if row.job.request.limits.masks}
        for place, row in masked.items():
            self._mask(made.allowed[place], row)
        constraints: dict[int, TokenConstraint] = {}
        grammar: Grammar | None = None
        for place, row in masked.items():
            if row.constraint is not None:
                constraints[place], grammar = row.constraint, row.job.request.limits.grammar
        if grammar is not None:
            grammar.fill(constraints, made.allowed)
        for place, row in masked.items():
            if not np.any(made.allowed[place]):
                row.problem = (
                    f"after {len(row.ids)} tokens no other may follow: what is asked for leaves "
                    "none"
                )
        return made

    def _fill(self, made: Adjustments[np.ndarray], place: int, row: ActiveCompletion) -> None:
        """Writes biases, penalties and min_p of a row, in the host's memory."""
        request = row.job.request
        made.min_p[place] = request.min_p
        ids = np.fromiter(request.limits.biases, np.int32)
        made.bias_ids[place, : len(ids)] = ids
        made.biases[place, : len(ids)] = [*request.limits.biases.values()]
        if request.penalties != NO_PENALTIES:
            made.repetition[place] = request.penalties.repetition
            made.frequency[place] = request.penalties.frequency
            made.presence[place] = request.penalties.presence
            tokens = [*request.prompt, *row.ids]
            made.tokens[place, : len(tokens)] = tokens
            made.n_prompt[place] = len(request.prompt)

    def _mask(self, mask: np.ndarray, row: ActiveCompletion) -> None:
        """Restricts the mask of a row, [words] uint32, but for its grammar."""
        limits, drawn = row.job.request.limits, row.ids
        if limits.allowed is not None:
            if row.allowed is None:
                row.allowed = pack_mask(limits.allowed, self._vocab)
            mask &= row.allowed
        banned = [word[-1] for word in limits.bad if _follows(drawn, word[:-1])]
        if len(drawn) < limits.min_tokens:
            banned.extend(limits.ends)
        if banned:
            remove_tokens(mask, banned)


def _follows(drawn: list[int], run: tuple[int, ...]) -> bool:
    """Returns True if the newest tokens are those of a run."""
    return not run or tuple(drawn[-len(run) :]) == run
