"""Token sequences, one by one or as a table of arrays: a data set may have millions of them."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

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
            ids=np.concatenate([none, *(one.ids for one in sequences)]),
            counts=np.concatenate([none, *(one.counts for one in sequences)]),
            lengths=[len(one) for one in sequences],
            rows=[one.row for one in sequences],
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
        found = np.zeros(len(self), np.int64)
        if len(starts):  # no running total of all tokens: they may be many
            sums = np.add.reduceat(self.counts, starts, dtype=np.int64)
            found[filled] = sums - self.counts[starts]
        return found

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
        """Returns the sequences of all rows but those numbered `rows`, and those of these."""
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
