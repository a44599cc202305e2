"""Token sequences of rows, their padded lengths, and their packing."""

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
    """Assigns sequences to rows of `room` tokens, by first fit, longest first (FFD).

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
        length = lengths[index]
        node = 1
        while node < leaves:
            node *= 2
            if free[node] < length:
                node += 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
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
    """Returns at most `most` padded lengths for rows, with the least padding.

    Dynamic programming over the distinct lengths finds them. There are fewer lengths than `most` if
    a further one saves almost no padding, or would have few rows.

    Args:
      lengths: [n], of the rows, rounded up to lengths that suit devices.
      most: the largest number of lengths.
      least: the smallest number of rows of a length; by default as many as repay a compilation.
      worth: fewer lengths are chosen if they need at most `worth` times the tokens that `most`
        lengths need.

    Returns:
      The lengths, ascending; the last is that of the longest row.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    if len(sizes) > _CANDIDATES:  # the longest of each run of neighbours stands for all of it
        run_ends = np.linspace(0, len(sizes), _CANDIDATES + 1).astype(int)[1:] - 1
        counts = np.diff(np.cumsum(counts)[run_ends], prepend=0)
        sizes = sizes[run_ends]
    rows_before = np.concatenate([[0], np.cumsum(counts)])  # rows of the first i sizes
    # Rows whose size is from index i to index j, [i, j], and their tokens if padded to size j.
    rows = rows_before[None, 1:] - rows_before[:-1, None]
    min_rows = min(_ROWS_A_LENGTH if least is None else least, rows_before[-1])
    range_tokens = np.where(rows >= min_rows, rows * sizes, np.inf)
    tokens_upto = range_tokens[0]  # [j], of the rows up to size j, padded to one length
    totals = [tokens_upto[-1]]  # tokens of all rows, by the number of lengths less one
    range_starts = []  # [j] each, the start of the last range of the rows up to size j
    for _ in range(most - 1):
        tokens_before = np.concatenate([[np.inf], tokens_upto[:-1]])
        tokens = tokens_before[:, None] + range_tokens
        range_starts.append(tokens.argmin(axis=0))
        tokens_upto = tokens.min(axis=0)
        totals.append(tokens_upto[-1])
    n_cuts = next(n for n, total in enumerate(totals) if total <= worth * min(totals))
    end = len(sizes) - 1
    chosen_lengths = [int(sizes[end])]
    for starts in reversed(range_starts[:n_cuts]):
        end = int(starts[end]) - 1
        chosen_lengths.append(int(sizes[end]))
    return tuple(reversed(chosen_lengths))


# The arrays that `Sequences.as_bytes` writes, in their order, with their dtypes.
_STORED_DTYPES = {"lengths": "<i8", "rows": "<i8", "ids": "<i4", "counts": "?", "labels": "?"}


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSequence:
    """One sequence: `ids` [n] int32, and `counts` [n] bool, True if the loss counts a token."""

    ids: np.ndarray
    counts: np.ndarray
    row: int = 0  # of the data, counted from 1

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences(Sequence[TokenSequence]):
    """A table of many sequences, concatenated in a few arrays.

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
        """Returns a list of sequences as a table; returns a table unchanged."""
        if isinstance(sequences, cls):
            return sequences
        no_tokens = np.empty(0, np.int32)
        return cls.from_arrays(
            ids=np.concatenate([no_tokens, *(sequence.ids for sequence in sequences)]),
            counts=np.concatenate([no_tokens, *(sequence.counts for sequence in sequences)]),
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
        """Returns a table made of concatenated arrays and the sequences' lengths."""
        rows = np.asarray(rows, np.int64)
        return cls(
            ids=np.asarray(ids, np.int32),
            counts=np.asarray(counts, bool),
            starts=np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]),
            rows=rows,
            origins=np.broadcast_to(np.asarray(origins, np.int32), rows.shape),
            labels=np.broadcast_to(np.asarray(labels, bool), rows.shape),
        )

    @classmethod
    def join(cls, tables: Sequence["Sequences"]) -> "Sequences":
        """Concatenates the tables of several data sets; each origin is the data set's index."""
        lengths = [len(table) for table in tables]
        origins = np.repeat(np.arange(len(tables), dtype=np.int32), lengths)
        return dataclasses.replace(cls.concatenate(tables), origins=origins)

    @classmethod
    def concatenate(cls, tables: Iterable["Sequences"]) -> "Sequences":
        """Returns the sequences of several tables, in order, with their origins."""
        tables = [cls.from_list([]), *tables]
        arrays = {}
        for name in ("ids", "counts", "lengths", "rows", "origins", "labels"):
            arrays[name] = np.concatenate([getattr(table, name) for table in tables])
        return cls.from_arrays(**arrays)

    @classmethod
    def from_bytes(cls, data: Any, origin: int = 0) -> "Sequences":
        """Returns the sequences that `as_bytes` wrote; their arrays are views of `data`."""
        header = np.frombuffer(data, "<i8", 2)
        n_sequences, n_tokens = header.tolist()
        offset = header.nbytes
        arrays = {}
        for name, dtype in _STORED_DTYPES.items():
            size = n_tokens if name in ("ids", "counts") else n_sequences
            arrays[name] = np.frombuffer(data, dtype, size, offset)
            offset += arrays[name].nbytes
        return cls.from_arrays(**arrays, origins=origin)

    def as_bytes(self) -> list[memoryview]:
        """Returns the sequences as the bytes of several arrays, without their origins."""
        header = np.array([len(self), len(self.ids)], "<i8")
        arrays = [
            np.ascontiguousarray(getattr(self, name), dtype)
            for name, dtype in _STORED_DTYPES.items()
        ]
        return [array.data for array in (header, *arrays)]

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Returns the number of tokens of each sequence: [n]."""
        return np.diff(self.starts)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Returns the number of counted tokens of each sequence, without its first: [n]."""
        has_tokens = self.lengths > 0
        starts = self.starts[:-1][has_tokens]
        n_predicted = np.zeros(len(self), np.int64)
        if len(starts):  # no running total of all tokens: they may be many
            sums = np.add.reduceat(self.counts, starts, dtype=np.int64)
            n_predicted[has_tokens] = sums - self.counts[starts]
        return n_predicted

    @overload
    def __getitem__(self, index: int) -> TokenSequence: ...
    @overload
    def __getitem__(self, index: slice) -> "Sequences": ...
    def __getitem__(self, index: int | slice) -> "TokenSequence | Sequences":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        index = range(len(self))[index]  # raises IndexError; counts from the end, too
        tokens = slice(self.starts[index], self.starts[index + 1])
        return TokenSequence(self.ids[tokens], self.counts[tokens], int(self.rows[index]))

    def __iter__(self) -> Iterator[TokenSequence]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: np.ndarray) -> "Sequences":
        """Returns the sequences at `indices`, [m], in that order."""
        if np.array_equal(indices, np.arange(len(self))):
            return self
        return self._cut(indices, self.lengths[indices])

    def split(self, rows: np.ndarray) -> tuple["Sequences", "Sequences"]:
        """Splits the sequences in two: those whose rows are not in `rows`, and those that are."""
        is_in_rows = np.isin(self.rows, rows)
        others = self.select(np.flatnonzero(~is_in_rows))
        return others, self.select(np.flatnonzero(is_in_rows))

    def cut(self, most: int) -> "Sequences":
        """Returns the sequences, each cut to at most `most` tokens."""
        if not len(self) or self.lengths.max() <= most:
            return self
        return self._cut(np.arange(len(self)), np.minimum(self.lengths, most))

    def _cut(self, indices: np.ndarray, lengths: np.ndarray) -> "Sequences":
        """Returns the first `lengths` tokens, [m], of the sequences at `indices`, [m]."""
        starts = np.concatenate([[0], np.cumsum(lengths)])
        shifts = self.starts[indices] - starts[:-1]  # of each sequence in the tokens
        tokens = np.arange(starts[-1]) + np.repeat(shifts, lengths)
        return Sequences(
            ids=self.ids[tokens],
            counts=self.counts[tokens],
            starts=starts,
            rows=self.rows[indices],
            origins=self.origins[indices],
            labels=self.labels[indices],
        )


MapFunction = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


def map_serially(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Returns ``[work(item) for item in items]``."""
    return [work(item) for item in items]
