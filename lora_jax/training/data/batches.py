"""Examples, and the batches of fixed shape that are made from them.

A group is the rows that batches pad to one length. A unit is the sequences that stay together in a
row, such as the two completions of a pair. A member of a row is the index of one of its sequences.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.training.data.mixture import Shares, allot_rows
from lora_jax.training.data.sequences import Sequences, TokenSequence, few_lengths, first_fit

HostBatch = dict[str, np.ndarray]

_MULTIPLE = 8  # lengths are rounded up to it: odd ones are slower on every device
_LONG_TOKENS = 1024
_LONG_MULTIPLE = 128  # of lengths from there on: long rows are cut into blocks, and over devices


class Examples:
    """Arrays of equal length, from which batches are taken."""

    unit = "token"  # what `tokens` counts

    def by_name(self) -> HostBatch:
        """Returns the arrays, [n, …], by name."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(next(iter(self.by_name().values())))

    @property
    def groups(self) -> np.ndarray | None:
        """Returns the padding group of each row, [n]; None without groups."""
        return None

    @property
    def by_length(self) -> np.ndarray:
        """Returns the row indices in the order in which `parts` yields them: [n]."""
        n = len(self)
        return np.arange(n) if self.groups is None else np.argsort(self.groups, kind="stable")

    @property
    def mixture(self) -> Shares | None:
        """Returns the rows that an epoch draws of each data set; None for each row once."""
        return None

    def take(self, rows: np.ndarray) -> HostBatch:
        """Returns the rows with these indices, of any shape: arrays [*rows.shape, …]."""
        return {name: array[rows] for name, array in self.by_name().items()}

    def parts(self, batch_size: int) -> Iterator[HostBatch]:
        """Yields all rows in order, in batches; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            yield self.take(np.arange(start, stop))

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of units in a batch, without padding; see `unit`."""
        raise NotImplementedError

    def name(self, row: int) -> str:
        """Returns the name of a row, for messages."""
        return f"example {row}"

    def digest(self) -> str:
        """Returns a fingerprint of all rows, to check that a resumed run has the same data."""
        sha = hashlib.sha256()
        for name, array in self.by_name().items():
            sha.update(f"{name}{array.shape}".encode() + array.tobytes())
        return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class Arrays(Examples):
    """Examples made of a user's own arrays.

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
    """Examples with batches that are padded to the smallest suitable length of a few."""

    def _padding(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Returns the padded lengths, ascending, and the unpadded size of each row: [n]."""
        raise NotImplementedError

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """Returns the index of the smallest of `lengths` that fits each row: [n]."""
        lengths, sizes = self._padding()
        return np.asarray(np.searchsorted(lengths, sizes))

    @property
    def filled(self) -> float:
        """Returns the share of batch positions that are not padding, over an epoch."""
        draws = np.ones(len(self)) if self.mixture is None else self.mixture.often
        lengths, sizes = self._padding()
        padded_sizes = np.asarray(lengths)[self.groups]
        return float(draws @ sizes / (draws @ padded_sizes))

    def parts(self, batch_size: int) -> Iterator[HostBatch]:
        """Yields all rows by length, in batches of few shapes, padded with rows of weight 0."""
        order = self.by_length
        for start in range(0, len(self), batch_size):
            batch = self.take(np.resize(order[start : start + batch_size], batch_size))
            batch["weights"][len(self) - start :] = 0
            yield batch


class Further(Protocol):
    """A source of extra arrays for each row of the data, such as images."""

    def arrays(self, origin: int, row: int) -> HostBatch:
        """Returns the extra arrays of a row, which have the same shapes for all rows."""

    def digest(self) -> str:
        """Returns a fingerprint of all arrays."""


@dataclasses.dataclass(frozen=True, eq=False)
class Packs(Padded):
    """Token sequences to be batched, stored without padding; a row has one or several sequences.

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
        """Returns the rows with these indices, of any shape: arrays [*rows.shape, …]."""
        batch = self.batch_of([(self, rows.ravel())])
        if self.further is not None:
            row_arrays = []
            for row in rows.ravel().tolist():
                origin, data_row = self.origins_of(row)[0]
                row_arrays.append(self.further.arrays(origin, data_row))
            for name in row_arrays[0]:
                batch[name] = np.stack([arrays[name] for arrays in row_arrays])
        return {name: array.reshape(*rows.shape, *array.shape[1:]) for name, array in batch.items()}

    @staticmethod
    def batch_of(parts: Sequence[tuple["Packs", np.ndarray]]) -> HostBatch:
        """Returns rows of several `Packs` of equal lengths as one batch: arrays [rows, …].

        Args:
          parts: each `Packs`, with the indices of its rows: [n].
        """
        group = max(int(packs.groups[rows].max()) for packs, rows in parts)
        packs_and_rows = []
        max_counted = 0
        for packs, rows in parts:
            for row in rows.tolist():
                packs_and_rows.append((packs, row))
                _, is_counted = packs._tokens_and_counts(row)
                max_counted = max(max_counted, int(is_counted.sum()))
        first_packs, _ = parts[0]
        batch = first_packs.blank(len(packs_and_rows), group, max_counted)
        for index, (packs, row) in enumerate(packs_and_rows):
            row_arrays = {name: array[index] for name, array in batch.items()}
            packs._fill(row_arrays, row)
        return batch

    def blank(self, n: int, group: int = -1, counted: int = 0) -> HostBatch:
        """Returns `n` padding rows of the largest length, or of a group's length.

        If `counted`, the number of tokens that count in a row, exceeds what `predicted` says, the
        arrays of predicted tokens are as long as the row.
        """
        length = self.lengths[group]
        m = self.predicted[group] if counted <= self.predicted[group] else length
        batch = {}
        for name in ("ids", "segment_ids", "positions"):
            batch[name] = np.zeros((n, length), np.int32)
        for name in ("predict_at", "targets", "weights"):
            batch[name] = np.zeros((n, m), np.int32)
        return batch

    def _tokens_and_counts(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a row's tokens, and a flag for each that the loss counts: [m]."""
        bounds = self._bounds(row)
        row_tokens = slice(bounds[0], bounds[-1])
        is_counted = self.table.counts[row_tokens].copy()
        first_tokens = bounds[:-1] - bounds[0]
        is_counted[first_tokens] = False  # the first token of a sequence is never predicted
        return self.table.ids[row_tokens], is_counted

    def _bounds(self, row: int) -> np.ndarray:
        """Returns the start of each sequence of a row in the table, and the last one's end."""
        return self.table.starts[self.firsts[row] : self.firsts[row + 1] + 1]

    def _fill(self, arrays: HostBatch, row: int) -> None:
        """Writes a row into its slices of a padded batch's arrays: [seq], [m]."""
        bounds = self._bounds(row)
        lengths = np.diff(bounds)
        begins = bounds[:-1] - bounds[0]
        ids, is_counted = self._tokens_and_counts(row)
        targets = np.flatnonzero(is_counted)  # places of the predicted tokens
        arrays["ids"][: len(ids)] = ids
        arrays["segment_ids"][: len(ids)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        arrays["positions"][: len(ids)] = np.arange(len(ids)) - np.repeat(begins, lengths)
        arrays["predict_at"][: len(targets)] = targets - 1
        arrays["targets"][: len(targets)] = ids[targets]
        arrays["weights"][: len(targets)] = 1

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return int((batch["segment_ids"] > 0).sum())

    def name(self, row: int) -> str:
        """Returns the names of the data rows in a packed row: "row 3, row 7"."""
        names = []
        for origin, number in self.origins_of(row):
            source = f" of {self.sources[origin]}" if self.sources else ""
            names.append(f"row {number}{source}")
        return ", ".join(names)

    def origins_of(self, row: int) -> list[tuple[int, int]]:
        """Returns the distinct (data set, row) pairs of a packed row's sequences."""
        members = slice(self.firsts[row], self.firsts[row + 1])
        origins = self.table.origins[members].tolist()
        data_rows = self.table.rows[members].tolist()
        return list(dict.fromkeys(zip(origins, data_rows, strict=True)))

    def digest(self) -> str:
        """Returns a fingerprint of all rows, to check that a resumed run has the same data."""
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
    """Returns one sequence per row or, with `packing`, as many as fit; see `first_fit`.

    Rows are as long as the longest needs, and no longer than `seq_len`. Without packing, batches
    have one of a few lengths; see `few_lengths`. With `like`, they have its lengths. Each `a_unit`
    sequences are a unit, and a row has `a_unit` times `seq_len` tokens at most.
    """
    table = Sequences.from_list(sequences)
    row_tokens = seq_len * a_unit
    rows = _row_members(table, row_tokens, packing, a_unit)
    if like is None:
        return _make_packs(table, rows, row_tokens, packing=packing)
    return dataclasses.replace(like, table=table.select(rows.members), firsts=rows.firsts)


def pack_mixture(
    parts: Mapping[str, Sequence[TokenSequence]],
    weights: Sequence[float] | None,
    seq_len: int,
    *,
    packing: bool,
) -> Packs:
    """Returns the joint rows of several data sets; see `pack`.

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
    tables = [Sequences.from_list(sequences) for sequences in parts.values()]
    joined_table = Sequences.join(tables)
    names = tuple(parts)
    if weights is None:
        rows = _row_members(joined_table, seq_len, packing)
        packs = _make_packs(joined_table, rows, seq_len, packing=packing)
        return dataclasses.replace(packs, sources=names)
    rows_of_tables = [_row_members(table, seq_len, packing) for table in tables]
    joined_members = []
    offset = 0  # of a table in the joined one
    for table, rows in zip(tables, rows_of_tables, strict=True):
        joined_members.append(rows.members + offset)
        offset += len(table)
    joined_rows = _RowMembers(
        members=np.concatenate(joined_members),
        counts=np.concatenate([rows.counts for rows in rows_of_tables]),
    )
    return dataclasses.replace(
        _make_packs(joined_table, joined_rows, seq_len, packing=packing),
        sources=names,
        mixture=allot_rows(
            names,
            weights,
            rows=[len(np.unique(table.rows)) for table in tables],
            units=[len(rows.counts) for rows in rows_of_tables],
        ),
    )


class _RowMembers(NamedTuple):
    """The sequences of each packed row.

    Attributes:
      members: [n], indices of sequences in the order of the rows.
      counts: [rows], the number of sequences of each row.
    """

    members: np.ndarray
    counts: np.ndarray

    @property
    def firsts(self) -> np.ndarray:
        """Returns the index of each row's first sequence, and the end: [rows + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)])


def _row_members(table: Sequences, row_tokens: int, packing: bool, a_unit: int = 1) -> _RowMembers:
    """Assigns sequences to rows: one unit each or, with `packing`, as many as fit."""
    sequences_of_units = np.arange(len(table)).reshape(-1, a_unit)
    n_units = len(sequences_of_units)
    if not packing:
        return _RowMembers(members=sequences_of_units.ravel(), counts=np.full(n_units, a_unit))
    unit_tokens = table.lengths[sequences_of_units].sum(axis=1)
    units_of_rows = first_fit(unit_tokens.tolist(), row_tokens)
    units = np.concatenate([np.array(row_units) for row_units in units_of_rows])
    counts = np.array([a_unit * len(row_units) for row_units in units_of_rows])
    return _RowMembers(members=sequences_of_units[units].ravel(), counts=counts)


def _make_packs(table: Sequences, rows: _RowMembers, row_tokens: int, *, packing: bool) -> Packs:
    """Returns the rows, with padded lengths of at most `row_tokens`."""
    table = table.select(rows.members)
    firsts = rows.firsts
    sizes = np.diff(table.starts[firsts])
    rounded_sizes = round_up(sizes, row_tokens)
    lengths = (int(rounded_sizes.max()),) if packing else few_lengths(rounded_sizes)
    groups = np.searchsorted(lengths, sizes)
    predicted_before = np.concatenate([[0], np.cumsum(table.predicted)])  # each sequence
    row_predicted = np.diff(predicted_before[firsts])
    predicted = []
    for group, length in enumerate(lengths):
        largest = int(row_predicted[groups <= group].max(initial=1))
        predicted.append(int(round_up(largest, length)))
    return Packs(table=table, firsts=firsts, lengths=lengths, predicted=tuple(predicted))


def round_up(lengths: Any, most: int) -> Any:
    """Returns lengths rounded up to multiples of 8, or of 128 if long, but at most `most`."""
    multiple = np.where(np.asarray(lengths) < _LONG_TOKENS, _MULTIPLE, _LONG_MULTIPLE)
    return np.minimum(most, -(-lengths // multiple) * multiple)
