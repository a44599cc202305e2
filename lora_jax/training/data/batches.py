"""Examples, and the batches of fixed shape that are taken from them."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lora_jax.training.data.mixture import Shares, shares_of
from lora_jax.training.data.sequences import Sequences, TokenSequence, few_lengths, first_fit

HostBatch = dict[str, np.ndarray]

_MULTIPLE = 8  # lengths are rounded up to it: odd ones are slower on every device
_LONG, _MULTIPLE_OF_LONG = 1024, 128  # long rows are cut into blocks, and over devices


class Examples:
    """Holds arrays of one length, from which batches are taken."""

    unit = "token"  # what `tokens` counts

    def by_name(self) -> HostBatch:
        """Returns the arrays, [n, …], by name."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(next(iter(self.by_name().values())))

    @property
    def groups(self) -> np.ndarray | None:
        """Returns the group of each row, [n], or None; rows of one group need the least padding."""
        return None

    @property
    def by_length(self) -> np.ndarray:
        """Returns the rows in the order in which `parts` yields them: [n]."""
        n = len(self)
        return np.arange(n) if self.groups is None else np.argsort(self.groups, kind="stable")

    @property
    def mixture(self) -> Shares | None:
        """Returns the number of rows of each data set in an epoch; None for each row once."""
        return None

    def take(self, rows: np.ndarray) -> HostBatch:
        """Returns the rows at the indices `rows`, of any shape: arrays [*rows.shape, …]."""
        return {name: array[rows] for name, array in self.by_name().items()}

    def parts(self, batch_size: int) -> Iterator[HostBatch]:
        """Yields all rows in order, in batches; the last one may be shorter."""
        for first in range(0, len(self), batch_size):
            yield self.take(np.arange(first, min(first + batch_size, len(self))))

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of units in a batch, without padding; see `unit`."""
        raise NotImplementedError

    def name(self, row: int) -> str:
        """Returns a name of one of the rows, for messages."""
        return f"example {row}"

    def digest(self) -> str:
        """Returns a fingerprint of all rows: a resumed run must go on with the same."""
        sha = hashlib.sha256()
        for name, array in self.by_name().items():
            sha.update(f"{name}{array.shape}".encode() + array.tobytes())
        return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class Arrays(Examples):
    """Holds a user's own arrays.

    Attributes:
      arrays: [n, …], by the names that the loss knows them by.
    """

    arrays: HostBatch
    unit = "example"

    def by_name(self) -> HostBatch:
        """Returns the arrays."""
        return self.arrays

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of examples in a batch, [accumulate, batch, …]."""
        return int(np.prod(next(iter(batch.values())).shape[:2]))


class Padded(Examples):
    """Holds rows that batches pad to the smallest of a few lengths that holds them."""

    def _padding(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Returns the lengths, ascending, and the number of places that each row needs: [n]."""
        raise NotImplementedError

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """Returns for each row the index of the smallest of `lengths` that holds it: [n]."""
        return np.asarray(np.searchsorted(*self._padding()))

    @property
    def filled(self) -> float:
        """Returns the share of tokens in the padded rows that are no padding, over an epoch."""
        often = np.ones(len(self)) if self.mixture is None else self.mixture.often
        lengths, sizes = self._padding()
        return float(often @ sizes / (often @ np.asarray(lengths)[self.groups]))

    def parts(self, batch_size: int) -> Iterator[HostBatch]:
        """Yields all rows, by length, in batches of few shapes; weights of 0 fill up the last."""
        order = self.by_length
        for first in range(0, len(self), batch_size):
            part = self.take(np.resize(order[first : first + batch_size], batch_size))
            part["weights"][len(self) - first :] = 0
            yield part


class Further(Protocol):
    """Further arrays of each row of the data, such as its images."""

    def arrays(self, origin: int, row: int) -> HostBatch:
        """Returns the arrays of a row of a data set, always of the same shapes."""

    def digest(self) -> str:
        """Returns a fingerprint of all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Packs(Padded):
    """Holds sequences ready to be batched, without padding; a row is one or several of them.

    A batch is padded to the smallest of `lengths` that holds its rows, so that a step has few
    shapes. Its arrays are int32, the first three [batch, seq], the others [batch, m]:

    - ids: tokens.
    - segment_ids: 0 for padding, 1, 2, … for the sequences that share a row.
    - positions: of each token in its own sequence.
    - predict_at: the places in `ids` that predict a token that the loss counts. The head runs at
      these alone: with a long prompt most logits would be thrown away.
    - targets: the tokens to predict there.
    - weights: 1, or 0 where a row has fewer than m such tokens.

    Attributes:
      table: the sequences in the order of the rows.
      firsts: [n + 1], the first sequence of each row.
      lengths: ascending, the lengths that batches are padded to.
      predicted: m, for each of the lengths.
      sources: the names of the data sets, where there are several.
      mixture: what an epoch draws of each data set; None where it has each row once.
      further: further arrays of a batch; a row then has one sequence.
    """

    table: Sequences
    firsts: np.ndarray
    lengths: tuple[int, ...]
    predicted: tuple[int, ...]
    sources: tuple[str, ...] = ()
    mixture: Shares | None = None
    further: Further | None = None

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def _padding(self) -> tuple[tuple[int, ...], np.ndarray]:
        return self.lengths, np.diff(self.table.starts[self.firsts])

    def take(self, rows: np.ndarray) -> HostBatch:
        """Returns the rows at the indices `rows`, of any shape: arrays [*rows.shape, …]."""
        batch = self.batch_of([(self, rows.ravel())])
        if self.further is not None:
            each = [self.further.arrays(*self.origins_of(row)[0]) for row in rows.ravel().tolist()]
            batch |= {name: np.stack([example[name] for example in each]) for name in each[0]}
        return {name: array.reshape(*rows.shape, *array.shape[1:]) for name, array in batch.items()}

    @staticmethod
    def batch_of(parts: Sequence[tuple["Packs", np.ndarray]]) -> HostBatch:
        """Returns rows of several tables of the same lengths as one batch: arrays [rows, …].

        Args:
          parts: tables, and the indices of rows in each: [n].
        """
        group = max(int(packs.groups[rows].max()) for packs, rows in parts)
        each = [(packs, row) for packs, rows in parts for row in rows.tolist()]
        counted = max(int(packs._counted(row)[1].sum()) for packs, row in each)
        batch = parts[0][0].blank(len(each), group, counted)
        for at, (packs, row) in enumerate(each):
            packs._fill({name: array[at] for name, array in batch.items()}, row)
        return batch

    def blank(self, n: int, group: int = -1, counted: int = 0) -> HostBatch:
        """Returns `n` rows of padding, as long as the longest, or as those of a group.

        Where more tokens count than `predicted` says, arrays of them are as long as the row.
        """
        length, most = self.lengths[group], self.predicted[group]
        sizes = dict.fromkeys(("ids", "segment_ids", "positions"), length)
        of_predicted = most if counted <= most else length
        sizes |= dict.fromkeys(("predict_at", "targets", "weights"), of_predicted)
        return {name: np.zeros((n, size), np.int32) for name, size in sizes.items()}

    def _counted(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a row's tokens, and which of them are predicted and count in the loss: [m]."""
        begins = self._begins(row)
        here = slice(begins[0], begins[-1])
        counts = self.table.counts[here].copy()
        counts[begins[:-1] - begins[0]] = False  # the first token of a sequence is never predicted
        return self.table.ids[here], counts

    def _begins(self, row: int) -> np.ndarray:
        """Returns the begin of each sequence of a row in the table, and the end of the last one."""
        return self.table.starts[self.firsts[row] : self.firsts[row + 1] + 1]

    def _fill(self, arrays: HostBatch, row: int) -> None:
        begins = self._begins(row)
        lengths, offsets = np.diff(begins), begins - begins[0]
        ids, counts = self._counted(row)
        (counted,) = np.nonzero(counts)
        arrays["ids"][: len(ids)] = ids
        arrays["segment_ids"][: len(ids)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        arrays["positions"][: len(ids)] = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
        arrays["predict_at"][: len(counted)] = counted - 1
        arrays["targets"][: len(counted)] = ids[counted]
        arrays["weights"][: len(counted)] = 1

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return int((batch["segment_ids"] > 0).sum())

    def name(self, row: int) -> str:
        """Returns the rows of the data that are in a sequence: "row 3, row 7"."""
        return ", ".join(
            f"row {number}" + (f" of {self.sources[origin]}" if self.sources else "")
            for origin, number in self.origins_of(row)
        )

    def origins_of(self, row: int) -> list[tuple[int, int]]:
        """Returns the data set and the row there of what a row has, each once."""
        here = slice(self.firsts[row], self.firsts[row + 1])
        origins, rows = self.table.origins[here].tolist(), self.table.rows[here].tolist()
        return list(dict.fromkeys(zip(origins, rows, strict=True)))

    def digest(self) -> str:
        """Returns a fingerprint of all rows: a resumed run must go on with the same."""
        sha = hashlib.sha256(f"{self.lengths}{self.predicted}".encode())
        for array in (self.table.ids, self.table.counts, self.table.starts, self.firsts):
            sha.update(f"{array.shape}".encode() + array.tobytes())
        if self.mixture is not None:
            sha.update(repr(self.mixture).encode())
        if self.further is not None:
            sha.update(self.further.digest().encode())
        return sha.hexdigest()

    def by_name(self) -> HostBatch:
        """Returns all rows as one batch."""
        return self.take(np.arange(len(self)))

    # All rows, padded alike, for inspection.
    ids = property(lambda self: self.by_name()["ids"])
    segment_ids = property(lambda self: self.by_name()["segment_ids"])
    positions = property(lambda self: self.by_name()["positions"])
    predict_at = property(lambda self: self.by_name()["predict_at"])
    targets = property(lambda self: self.by_name()["targets"])
    weights = property(lambda self: self.by_name()["weights"])


def pack(
    sequences: Sequence[TokenSequence],
    seq_len: int,
    *,
    packing: bool,
    like: Packs | None = None,
    a_unit: int = 1,
) -> Packs:
    """Returns one sequence a row or, with `packing`, as many as fit; see `first_fit`.

    Rows are as long as the longest needs, and no longer than `seq_len`. Without packing, batches
    have one of a few lengths; see `few_lengths`. With `like`, they have its lengths. Of each
    `a_unit` sequences, which stay together, `seq_len` is the mean.
    """
    table, most = Sequences.from_list(sequences), seq_len * a_unit
    members, counts = rows = _rows_of(table, most, packing, a_unit)
    if like is None:
        return _packs(table, rows, most, packing=packing)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    return dataclasses.replace(like, table=table.select(members), firsts=firsts)


def pack_mixture(
    parts: Mapping[str, Sequence[TokenSequence]],
    weights: Sequence[float] | None,
    seq_len: int,
    *,
    packing: bool,
) -> Packs:
    """Returns the rows of several data sets together; see `pack`.

    With weights, an epoch draws rows of each data set in proportion to them (see `Shares`), and
    `packing` puts rows of one data set into a sequence. Without weights, it has each row once.

    Args:
      parts: the sequences of each data set, by its name.
      weights: a positive number for each data set, or None.
      seq_len: tokens of a row, at most.
      packing: puts several sequences into one row.

    Raises:
      TrainingError: a weight is too small for a single row of an epoch.
    """
    tables = [Sequences.from_list(part) for part in parts.values()]
    joined, names = Sequences.join(tables), tuple(parts)
    if weights is None:
        packs = _packs(joined, _rows_of(joined, seq_len, packing), seq_len, packing=packing)
        return dataclasses.replace(packs, sources=names)
    rows = [_rows_of(table, seq_len, packing) for table in tables]
    offsets = np.cumsum([0, *map(len, tables)])[:-1]
    moved = [
        (members + offset, counts) for (members, counts), offset in zip(rows, offsets, strict=True)
    ]
    members, counts = (np.concatenate(arrays) for arrays in zip(*moved, strict=True))
    units = [len(counts) for _, counts in rows]
    data_rows = [len(np.unique(table.rows)) for table in tables]
    return dataclasses.replace(
        _packs(joined, (members, counts), seq_len, packing=packing),
        sources=names,
        mixture=shares_of(names, weights, rows=data_rows, units=units),
    )


def _rows_of(
    table: Sequences, seq_len: int, packing: bool, a_unit: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sequences in the order of their rows, [n], and how many each row has."""
    units = np.arange(len(table)).reshape(-1, a_unit)
    if not packing:
        return units.ravel(), np.full(len(units), a_unit)
    rows = first_fit(table.lengths[units].sum(axis=1).tolist(), seq_len)
    members = units[np.concatenate([np.array(row) for row in rows])]
    return members.ravel(), np.array([a_unit * len(row) for row in rows])


def _packs(
    table: Sequences, rows: tuple[np.ndarray, np.ndarray], seq_len: int, *, packing: bool
) -> Packs:
    members, counts = rows
    table = table.select(members)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    sizes = np.diff(table.starts[firsts])
    rounded = round_up(sizes, seq_len)
    lengths = (int(rounded.max()),) if packing else few_lengths(rounded)
    predicted = np.diff(np.concatenate([[0], np.cumsum(table.predicted)])[firsts])
    groups = np.searchsorted(lengths, sizes)
    most = [int(predicted[groups <= group].max(initial=1)) for group in range(len(lengths))]
    places = (int(round_up(m, length)) for m, length in zip(most, lengths, strict=True))
    return Packs(table=table, firsts=firsts, lengths=lengths, predicted=tuple(places))


def round_up(lengths: Any, most: int) -> Any:
    """Returns lengths that suit devices, none above `most`: multiples of 8, or of 128 if long."""
    multiple = np.where(np.asarray(lengths) < _LONG, _MULTIPLE, _MULTIPLE_OF_LONG)
    return np.minimum(most, -(-lengths // multiple) * multiple)
