"""Preference pairs in which both completions share one copy of the prompt."""

import itertools
from typing import NamedTuple

import numpy as np

from lora_jax.training.data.sequences import Sequences

PROMPT, CHOSEN, REJECTED = range(3)  # branches of a pair; see `lora_jax.models.layers.masks`


class JoinedPairs(NamedTuple):
    """Pairs as sequences: a prompt, the chosen completion, and the rejected one.

    Attributes:
      table: the sequences, one a pair.
      branches: int32 [tokens of `table`], PROMPT, CHOSEN or REJECTED for each token.
    """

    table: Sequences
    branches: np.ndarray


def share_of_prompts(table: Sequences) -> float:
    """Returns the share of prompt tokens among the tokens of pairs; 0 without tokens.

    Args:
      table: two sequences a pair, of which completions count.
    """
    return 2 * sum(_prompt_lengths(table)) / max(1, len(table.ids))


def join_pairs(table: Sequences) -> JoinedPairs:
    """Joins the two sequences of each pair to one, with a single copy of the prompt.

    A prompt is the common beginning of both sequences, before a token counts. A completion's first
    token does not count if there is no prompt to predict it from.

    Args:
      table: two sequences a pair, of which completions count.
    """
    pair_lengths = table.lengths.reshape(-1, 2)
    prompt_lengths = np.array(_prompt_lengths(table), np.int64)
    branch_lengths = np.column_stack([prompt_lengths, pair_lengths - prompt_lengths[:, None]])
    is_repeated_prompt = np.zeros(len(table.ids), bool)
    rejected_starts = table.starts[1:-1:2].tolist()
    for start, length in zip(rejected_starts, prompt_lengths.tolist(), strict=True):
        is_repeated_prompt[start : start + length] = True
    counts = table.counts.copy()
    counts[table.starts[:-1][table.lengths > 0]] = False
    joined_table = Sequences.from_arrays(
        ids=table.ids[~is_repeated_prompt],
        counts=counts[~is_repeated_prompt],
        lengths=branch_lengths.sum(axis=1),
        rows=table.rows[::2],
        origins=table.origins[::2],
    )
    pair_branches = np.arange(3, dtype=np.int32)
    branches = np.repeat(np.tile(pair_branches, len(branch_lengths)), branch_lengths.ravel())
    return JoinedPairs(joined_table, branches)


def split_pairs(joined: JoinedPairs) -> Sequences:
    """Inverts `join_pairs`; a counted prompt counts only before the chosen completion."""
    table = joined.table
    token_indices = [np.empty(0, np.int64)]
    counts = [np.empty(0, bool)]
    lengths = []
    for start, end in itertools.pairwise(table.starts.tolist()):
        branches = joined.branches[start:end]
        for branch in (CHOSEN, REJECTED):
            tokens = np.flatnonzero((branches == PROMPT) | (branches == branch))
            may_count = (branches[tokens] == branch) | (branch == CHOSEN)
            token_indices.append(start + tokens)
            counts.append(table.counts[start + tokens] & may_count)
            lengths.append(len(tokens))
    return Sequences.from_arrays(
        ids=table.ids[np.concatenate(token_indices)],
        counts=np.concatenate(counts),
        lengths=lengths,
        rows=np.repeat(table.rows, 2),
        origins=np.repeat(table.origins, 2),
    )


def _prompt_lengths(table: Sequences) -> list[int]:
    """Returns the number of prompt tokens of each pair; see `join_pairs`."""
    lengths = []
    for index in range(0, len(table), 2):
        chosen = table[index]
        rejected = table[index + 1]
        n = min(len(chosen), len(rejected))
        is_counted = chosen.counts[:n] | rejected.counts[:n]
        is_end = is_counted | (chosen.ids[:n] != rejected.ids[:n])
        lengths.append(int(np.argmax(np.append(is_end, True))))
    return lengths
