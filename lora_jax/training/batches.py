"""Batches of fixed shape; which sequences a batch holds is a function of the seed and the step."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Batch = dict[str, np.ndarray]

_MULTIPLE = 8  # lengths are rounded up to it: odd ones are slower on every device
_LONG, _MULTIPLE_OF_LONG = 1024, 128  # long rows are cut into blocks, and over devices
_SHOWN = 32  # as many rows of a batch are named


class Examples:
    """Holds arrays of one length, from which batches are taken."""

    unit = "token"  # what `tokens` counts

    def by_name(self) -> Batch:
        """Returns the arrays, [n, …], by name."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(next(iter(self.by_name().values())))

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the rows at the indices `rows`, of any shape: arrays [*rows.shape, …]."""
        return {name: array[rows] for name, array in self.by_name().items()}

    def parts(self, batch_size: int) -> Iterator[Batch]:
        """Yields all rows in order, in batches; the last one may be shorter."""
        for first in range(0, len(self), batch_size):
            yield self.take(np.arange(first, min(first + batch_size, len(self))))

    def tokens(self, batch: Batch) -> int:
        """Returns how much is in a batch, without padding; see `unit`."""
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

    arrays: Batch
    unit = "example"

    def by_name(self) -> Batch:
        """Returns the arrays."""
        return self.arrays

    def tokens(self, batch: Batch) -> int:
        """Returns the number of examples in a batch, [accumulate, batch, …]."""
        return int(np.prod(next(iter(batch.values())).shape[:2]))


@dataclasses.dataclass(frozen=True)
class Weighted(Examples):
    """Holds arrays with weights as its fields.

    Attributes:
      weights: [n] or [n, m], what each unit of the loss is multiplied by; 0 for one that does not
        count. Negative ones are welcome.
    """

    weights: np.ndarray

    def by_name(self) -> Batch:
        """Returns the fields that are arrays."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}

    def parts(self, batch_size: int) -> Iterator[Batch]:
        """Yields all rows in order, in batches of one shape; weights of 0 fill up the last."""
        for first in range(0, len(self), batch_size):
            rows = np.arange(first, first + batch_size)
            part = self.take(rows % len(self))
            real = rows < len(self)
            part["weights"] = part["weights"] * real.reshape(-1, *[1] * (self.weights.ndim - 1))
            yield part


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Holds one sequence: `ids` [n] int32, and `counts` [n] bool, True where the loss counts."""

    ids: np.ndarray
    counts: np.ndarray
    row: int = 0  # of the data, counted from 1

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Packs(Weighted):
    """Holds sequences ready to be batched: int32, [n, seq] and, of what is predicted, [n, m].

    Attributes:
      ids: [n, seq], tokens.
      segment_ids: [n, seq], 0 for padding, 1, 2, … for the sequences that share a row.
      positions: [n, seq], of each token in its own sequence.
      predict_at: [n, m], where in `ids` a token is predicted that the loss counts. The head runs
        there only: with a long prompt most logits would be thrown away.
      targets: [n, m], the tokens that follow there.
      weights: [n, m], 1, or 0 where a row has fewer than m such tokens.
      sources: for each of the n, the rows of the data that are in it, counted from 1.
    """

    ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    predict_at: np.ndarray
    targets: np.ndarray
    sources: tuple[tuple[int, ...], ...] = ()

    def tokens(self, batch: Batch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return int((batch["segment_ids"] > 0).sum())

    def name(self, row: int) -> str:
        """Returns the rows of the data that are in a sequence: "row 3, row 7"."""
        return ", ".join(f"row {number}" for number in self.sources[row])


def pack(sequences: Sequence[Tokens], seq_len: int, *, packing: bool) -> Packs:
    """Returns one sequence a row or, with `packing`, as many as fit (first fit, longest first).

    Rows are as long as the longest needs, and no longer than `seq_len`.
    """
    rows: list[list[Tokens]] = []
    if packing:
        free: list[int] = []
        for tokens in sorted(sequences, key=len, reverse=True):  # stable: no chance involved
            row = next((i for i, room in enumerate(free) if room >= len(tokens)), len(rows))
            if row == len(rows):
                rows.append([])
                free.append(seq_len)
            rows[row].append(tokens)
            free[row] -= len(tokens)
    else:
        rows = [[tokens] for tokens in sequences]
    length = round_up(max(sum(map(len, members)) for members in rows), seq_len)
    counted = round_up(max(sum(t.counts[1:].sum() for t in members) for members in rows), length)
    of_length = {"ids": length, "segment_ids": length, "positions": length}
    of_length |= {"predict_at": counted, "targets": counted, "weights": counted}
    packs = Packs(
        **{name: np.zeros((len(rows), size), np.int32) for name, size in of_length.items()},
        sources=tuple(tuple(tokens.row for tokens in members) for members in rows),
    )
    for row, members in enumerate(rows):
        offset = first = 0
        for segment, tokens in enumerate(members, start=1):
            here = np.s_[row, offset : offset + len(tokens)]
            packs.ids[here] = tokens.ids
            packs.segment_ids[here] = segment
            packs.positions[here] = np.arange(len(tokens))
            (before,) = np.nonzero(tokens.counts[1:])
            there = np.s_[row, first : first + len(before)]
            packs.predict_at[there] = offset + before
            packs.targets[there] = tokens.ids[before + 1]
            packs.weights[there] = 1
            offset += len(tokens)
            first += len(before)
    return packs


def round_up(length: int, most: int) -> int:
    """Returns a length that suits devices, no more than `most`: a multiple of 8, or 128 if long."""
    multiple = _MULTIPLE if length < _LONG else _MULTIPLE_OF_LONG
    return min(most, -(-int(length) // multiple) * multiple)


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order of `n` rows in an epoch: [n], a permutation."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


@dataclasses.dataclass(frozen=True)
class Order:
    """Says which of `n_rows` a step takes. Epochs follow one another without a gap or a rest."""

    seed: int
    n_rows: int
    batch_size: int
    accumulate: int = 1

    @property
    def rows_a_step(self) -> int:
        """Returns how many rows one optimiser step sees."""
        return self.batch_size * self.accumulate

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows of the step after `step` steps: [accumulate, batch_size]."""
        taken = step * self.rows_a_step + np.arange(self.rows_a_step)
        epochs, within = np.divmod(taken, self.n_rows)
        orders = {epoch: order(self.seed, epoch, self.n_rows) for epoch in set(epochs.tolist())}
        rows = [orders[epoch][i] for epoch, i in zip(epochs.tolist(), within, strict=True)]
        return np.array(rows).reshape(self.accumulate, self.batch_size)

    def cursor(self, step: int) -> dict[str, int]:
        """Returns where the data stand after `step` steps."""
        epoch, row = divmod(step * self.rows_a_step, self.n_rows)
        return {"epoch": epoch, "row": row}

    def steps(self, epochs: float) -> int:
        """Returns the number of steps that see every row `epochs` times."""
        return max(1, -(-int(np.ceil(epochs * self.n_rows)) // self.rows_a_step))


@dataclasses.dataclass(frozen=True)
class Feed:
    """Says which examples each step takes.

    Attributes:
      examples: the examples to train on.
      order: their order.
      name: names one of them in messages.
      source: the name of all of them.
    """

    examples: Examples
    order: Order
    name: Callable[[int], str]
    source: str = "the examples"

    def batch(self, number: int) -> Batch:
        """Returns the batch of the step that has `number` steps before it, in this process."""
        return self.examples.take(self.order.rows(number))

    def named(self, number: int) -> str:
        """Returns the names of what is in that batch."""
        rows = self.order.rows(number).ravel().tolist()
        left_out = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        return f"{', '.join(map(self.name, rows[:_SHOWN]))}{left_out} of {self.source}"
