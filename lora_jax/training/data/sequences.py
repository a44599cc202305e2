"""Token sequences of rows, the few lengths that they are padded to, and their packing."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

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

    >>> from lora_jax.training.data.sequences import first_fit
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
    widths, to = [], len(sizes) - 1
    for cut in reversed(cuts[:n]):
        widths.append(to)
        to = int(cut[to]) - 1
    widths.append(to)
    return tuple(int(sizes[i]) for i in reversed(widths))


# As bytes: lengths, rows, tokens, which ones count, and labels.
_KINDS = ("<i8", "<i8", "<i4", "?", "?")


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSequence:
    """Holds one sequence: `ids` [n] int32, and `counts` [n] bool, True where the loss counts."""

    ids: np.ndarray
    counts: np.ndarray
    row: int = 0  # of the data, counted from 1

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences(Sequence[TokenSequence]):
    """Holds many sequences end to end, in a few arrays.

    Attributes:
      ids: [total] int32, the tokens of all.
      counts: [total] bool, True where the loss counts.
      starts: [n + 1], where each sequence begins in those.
      rows: [n], the row of the data that each comes from, counted from 1.
      origins: [n], the data set that each comes from, counted from 0.
      labels: [n] bool, whether each is a good example, where some are bad ones.
    """

    ids: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    origins: np.ndarray
    labels: np.ndarray

    @classmethod
    def from_list(cls, sequences: Sequence[TokenSequence]) -> "Sequences":
        """Returns a list of sequences as a table; a table as it is."""
        if isinstance(sequences, cls):
            return sequences
        none = np.empty(0, np.int32)
        return cls.from_arrays(
            ids=np.concatenate([none, *(sequence.ids for sequence in sequences)]),
            counts=np.concatenate([none, *(sequence.counts for sequence in sequences)]),
            lengths=[len(sequence) for sequence in sequences],
            rows=[sequence.row for sequence in sequences],
        )

    @classmethod
    def from_arrays(
        cls,
        *,
        ids: Any,
        counts: Any,
        lengths: Any,
        rows: Any,
        origins: Any = 0,
        labels: Any = False,
    ) -> "Sequences":
        """Returns a table of sequences, from arrays as `Sequences` has them and their lengths."""
        numbers = np.asarray(rows, np.int64)
        return cls(
            ids=np.asarray(ids, np.int32),
            counts=np.asarray(counts, bool),
            starts=np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]),
            rows=numbers,
            origins=np.broadcast_to(np.asarray(origins, np.int32), numbers.shape),
            labels=np.broadcast_to(np.asarray(labels, bool), numbers.shape),
        )

    @classmethod
    def join(cls, parts: Sequence["Sequences"]) -> "Sequences":
        """Returns the sequences of several data sets, one after the other, with their origins."""
        origins = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        return dataclasses.replace(cls.concatenate(parts), origins=origins)

    @classmethod
    def concatenate(cls, parts: Iterable["Sequences"]) -> "Sequences":
        """Returns the sequences of several tables, one after the other, with their origins."""
        tables = [cls.from_list([]), *parts]

        def all_of(name: str) -> np.ndarray:
            return np.concatenate([getattr(table, name) for table in tables])

        names = ("ids", "counts", "lengths", "rows", "origins", "labels")
        return cls.from_arrays(**{name: all_of(name) for name in names})

    @classmethod
    def from_bytes(cls, data: Any, origin: int = 0) -> "Sequences":
        """Returns the sequences that `as_bytes` wrote; their arrays are views of `data`."""
        n, total = np.frombuffer(data, "<i8", 2).tolist()
        arrays, at = [], 16
        for kind, size in zip(_KINDS, (n, n, total, total, n), strict=True):
            arrays.append(np.frombuffer(data, kind, size, at))
            at += arrays[-1].nbytes
        names = ("lengths", "rows", "ids", "counts", "labels")
        return cls.from_arrays(**dict(zip(names, arrays, strict=True)), origins=origin)

    def as_bytes(self) -> list[memoryview]:
        """Returns the sequences, but for their origins, as bytes in several parts."""
        arrays = (self.lengths, self.rows, self.ids, self.counts, self.labels)
        kept = [np.ascontiguousarray(a, kind) for a, kind in zip(arrays, _KINDS, strict=True)]
        return [array.data for array in (np.array([len(self), len(self.ids)], "<i8"), *kept)]

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Returns the number of tokens of each sequence: [n]."""
        return np.diff(self.starts)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Returns the number of tokens of each that the loss counts; never its first: [n]."""
        filled = self.lengths > 0
        starts = self.starts[:-1][filled]
        totals = np.zeros(len(self), np.int64)
        if len(starts):  # no running total of all tokens: they may be many
            sums = np.add.reduceat(self.counts, starts, dtype=np.int64)
            totals[filled] = sums - self.counts[starts]
        return totals

    @overload
    def __getitem__(self, index: int) -> TokenSequence: ...
    @overload
    def __getitem__(self, index: slice) -> "Sequences": ...
    def __getitem__(self, index: int | slice) -> "TokenSequence | Sequences":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        at = range(len(self))[index]  # raises IndexError; counts from the end, too
        here = slice(self.starts[at], self.starts[at + 1])
        return TokenSequence(self.ids[here], self.counts[here], int(self.rows[at]))

    def __iter__(self) -> Iterator[TokenSequence]:
        return (self[at] for at in range(len(self)))

    def select(self, at: np.ndarray) -> "Sequences":
        """Returns the sequences at the indices `at`, [m], in their order."""
        if np.array_equal(at, np.arange(len(self))):
            return self
        return self._cut(at, self.lengths[at])

    def split(self, rows: np.ndarray) -> tuple["Sequences", "Sequences"]:
        """Splits the sequences in two: all rows but those numbered `rows`, and these rows."""
        taken = np.isin(self.rows, rows)
        return self.select(np.flatnonzero(~taken)), self.select(np.flatnonzero(taken))

    def cut(self, most: int) -> "Sequences":
        """Returns the sequences, each cut off after `most` tokens."""
        if not len(self) or self.lengths.max() <= most:
            return self
        return self._cut(np.arange(len(self)), np.minimum(self.lengths, most))

    def _cut(self, at: np.ndarray, lengths: np.ndarray) -> "Sequences":
        """Returns the sequences at the indices `at`, of each its first `lengths` tokens."""
        starts = np.concatenate([[0], np.cumsum(lengths)])
        taken = np.arange(starts[-1]) + np.repeat(self.starts[at] - starts[:-1], lengths)
        return Sequences(
            ids=self.ids[taken],
            counts=self.counts[taken],
            starts=starts,
            rows=self.rows[at],
            origins=self.origins[at],
            labels=self.labels[at],
        )


MapFunction = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


def map_serially(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Returns ``[work(item) for item in items]``."""
    return [work(item) for item in items]
