"""Packs sequences into rows, and chooses the few lengths that rows are padded to."""

from collections.abc import Sequence

import numpy as np

MOST_LENGTHS = 8  # a step is compiled for each
_ROWS_A_LENGTH = 160  # fewer rows do not repay a compilation
_WORTH = 1.03  # a further length has to save this much padding, or more
_CANDIDATES = 256  # lengths that are tried


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Puts sequences into rows of `room` tokens: first fit, the longest first (FFD).

    At most 11/9 of the fewest rows possible are needed, and one more (Dósa, 2007). A tree over the
    rows' free tokens finds the first that fits, so n sequences take O(n log n).

    Args:
      lengths: lengths of the sequences, none longer than `room`.
      room: tokens of a row.

    Returns:
      For each row, the indices of its sequences. Equal lengths keep their order: no chance is
      involved.

    >>> from lora_jax.training.data.packing import first_fit
    >>> first_fit([3, 5, 2], 7)
    [[1, 2], [0]]
    """
    n = len(lengths)
    leaves = 1 << max(0, n - 1).bit_length()
    free = [room] * (2 * leaves)  # node i has the most free tokens of its leaves, 2i and 2i + 1
    rows: list[list[int]] = []
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length, node = lengths[index], 1
        while node < leaves:
            node *= 2
            if free[node] < length:
                node += 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return rows


def few_lengths(
    lengths: np.ndarray,
    most: int = MOST_LENGTHS,
    *,
    least: int | None = None,
    worth: float = _WORTH,
) -> tuple[int, ...]:
    """Returns at most `most` lengths that rows are padded to, so that little is padding.

    Dynamic programming over the distinct lengths finds those with the least padding. There are
    fewer where a further one saves next to nothing, or would have few rows.

    Args:
      lengths: [n], of the rows, rounded up to lengths that suit devices.
      most: the number of lengths.
      least: the number of rows that a length has, at least; by default as many as repay a
        compilation.
      worth: how many times as many tokens as with `most` lengths fewer may need.

    Returns:
      The lengths, ascending; the last is that of the longest row.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    if len(sizes) > _CANDIDATES:  # the longest of each run of neighbours stands for all of it
        last = np.linspace(0, len(sizes), _CANDIDATES + 1).astype(int)[1:] - 1
        counts = np.diff(np.cumsum(counts)[last], prepend=0)
        sizes = sizes[last]
    below = np.concatenate([[0], np.cumsum(counts)])  # rows of the first i sizes
    rows = below[None, 1:] - below[:-1, None]  # [from, to]
    least = _ROWS_A_LENGTH if least is None else least
    cost = np.where(rows >= min(least, below[-1]), rows * sizes, np.inf)
    best = cost[0]  # tokens of the rows up to each size, padded to one length
    totals, cuts = [best[-1]], []
    for _ in range(most - 1):
        split = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        cuts.append(split.argmin(axis=0))
        best = split.min(axis=0)
        totals.append(best[-1])
    n = next(i for i, total in enumerate(totals) if total <= worth * min(totals))
    found, to = [], len(sizes) - 1
    for cut in reversed(cuts[:n]):
        found.append(to)
        to = int(cut[to]) - 1
    found.append(to)
    return tuple(int(sizes[i]) for i in reversed(found))
