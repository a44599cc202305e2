"""Pairs of completions whose prompt stands in a row once, before both."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lora_jax.training.data.sequences import Sequences

PROMPT, CHOSEN, REJECTED = range(3)  # branches of a pair; see `lora_jax.models.layers.masks`


class JoinedPairs(NamedTuple):
    """Pairs as sequences: a prompt, the chosen completion, and the rejected one.

    Attributes:
      table: the sequences, one a pair.
      branches: int32 [tokens of `table`], the part of its pair that each token is of.
    """

    table: Sequences
    branches: np.ndarray


def share_of_prompts(table: Sequences) -> float:
    """Returns the share of the tokens of pairs that are prompts: 0 for no tokens.

    Args:
      table: two sequences a pair, of which completions count.
    """
    return 2 * sum(_prompts(table)) / max(1, len(table.ids))


def join_pairs(table: Sequences) -> JoinedPairs:
    """Returns pairs of sequences, the prompt of each pair once.

    A prompt is what both begin with, before a token counts. A completion's first token does not
    count where there is no prompt to predict it from.

    Args:
      table: two sequences a pair, of which completions count.
    """
    lengths = table.lengths.reshape(-1, 2)
    prompts = np.fromiter(_prompts(table), np.int64, len(lengths))
    parts = np.column_stack([prompts, lengths - prompts[:, None]])
    kept = np.ones(len(table.ids), bool)
    for start, n in zip(table.starts[1:-1:2].tolist(), prompts.tolist(), strict=True):
        kept[start : start + n] = False
    counts = table.counts.copy()
    counts[table.starts[:-1][table.lengths > 0]] = False
    joined = Sequences.from_arrays(
        ids=table.ids[kept],
        counts=counts[kept],
        lengths=parts.sum(axis=1),
        rows=table.rows[::2],
        origins=table.origins[::2],
    )
    branches = np.repeat(np.tile(np.arange(3, dtype=np.int32), len(parts)), parts.ravel())
    return JoinedPairs(joined, branches)


def split_pairs(joined: JoinedPairs) -> Sequences:
    """Inverts `join_pairs`; prompts that count do so before chosen completions alone."""
    table, branches = joined
    taken, counts = [], []
    for start, end in itertools.pairwise(table.starts.tolist()):
        of = branches[start:end]
        for side in (CHOSEN, REJECTED):
            mine = np.flatnonzero((of == PROMPT) | (of == side))
            taken.append(start + mine)
            counts.append(table.counts[start + mine] & ((of[mine] == side) | (side == CHOSEN)))
    none = np.empty(0, np.int64)
    return Sequences.from_arrays(
        ids=table.ids[np.concatenate([none, *taken])],
        counts=np.concatenate([none.astype(bool), *counts]),
        lengths=[len(places) for places in taken],
        rows=np.repeat(table.rows, 2),
        origins=np.repeat(table.origins, 2),
    )


def _prompts(table: Sequences) -> Iterator[int]:
    """Yields the number of tokens that stand once, of each pair."""
    for at in range(0, len(table), 2):
        chosen, rejected = table[at], table[at + 1]
        n = min(len(chosen), len(rejected))
        differs = chosen.counts[:n] | rejected.counts[:n] | (chosen.ids[:n] != rejected.ids[:n])
        yield int(np.argmax(np.append(differs, True)))
