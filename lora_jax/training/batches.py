"""Batches of fixed shape; which sequences a batch holds is a function of the seed and the step."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax.training.data.packing import few_lengths, first_fit

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

    @property
    def groups(self) -> np.ndarray | None:
        """Returns the group of each row, [n]: those of one make the smallest batches; or None."""
        return None

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


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """Holds one sequence: `ids` [n] int32, and `counts` [n] bool, True where the loss counts."""

    ids: np.ndarray
    counts: np.ndarray
    row: int = 0  # of the data, counted from 1

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Packs(Examples):
    """Holds sequences ready to be batched, without padding; a row is one or several of them.

    A batch is padded to the smallest of `lengths` that holds its rows, so that a step has few
    shapes. Its arrays are int32, [batch, seq] and, of what is predicted, [batch, m]:

    - ids: tokens.
    - segment_ids: 0 for padding, 1, 2, … for the sequences that share a row.
    - positions: of each token in its own sequence.
    - predict_at: where in `ids` a token is predicted that the loss counts. The head runs there
      only: with a long prompt most logits would be thrown away.
    - targets: the tokens that follow there.
    - weights: 1, or 0 where a row has fewer than m such tokens.

    Attributes:
      tokens_of_all: [total], of all sequences in the order of the rows.
      counts_of_all: [total] bool, True where the loss counts.
      starts: [sequences + 1], where each sequence begins in those.
      firsts: [n + 1], the first sequence of each row.
      numbers: [sequences], the row of the data that each sequence comes from, counted from 1.
      lengths: ascending, the lengths that batches are padded to.
      predicted: m, for each of the lengths.
    """

    tokens_of_all: np.ndarray
    counts_of_all: np.ndarray
    starts: np.ndarray
    firsts: np.ndarray
    numbers: np.ndarray
    lengths: tuple[int, ...]
    predicted: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.firsts) - 1

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """Returns for each row the index of the smallest of `lengths` that holds it: [n]."""
        return np.searchsorted(self.lengths, np.diff(self.starts[self.firsts]))

    @property
    def filled(self) -> float:
        """Returns the share of tokens in the padded rows that are no padding."""
        return len(self.tokens_of_all) / int(np.asarray(self.lengths)[self.groups].sum())

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the rows at the indices `rows`, of any shape: arrays [*rows.shape, …]."""
        flat = rows.ravel()
        group = int(self.groups[flat].max())
        sizes = dict.fromkeys(("ids", "segment_ids", "positions"), self.lengths[group])
        sizes |= dict.fromkeys(("predict_at", "targets", "weights"), self.predicted[group])
        batch = {name: np.zeros((len(flat), size), np.int32) for name, size in sizes.items()}
        for at, row in enumerate(flat.tolist()):
            self._fill({name: array[at] for name, array in batch.items()}, row)
        return {name: array.reshape(*rows.shape, -1) for name, array in batch.items()}

    def _fill(self, arrays: Batch, row: int) -> None:
        begins = self.starts[self.firsts[row] : self.firsts[row + 1] + 1]
        here, lengths, offsets = slice(begins[0], begins[-1]), np.diff(begins), begins - begins[0]
        ids, counts = self.tokens_of_all[here], self.counts_of_all[here].copy()
        counts[offsets[:-1]] = False  # the first token of a sequence is never predicted
        (counted,) = np.nonzero(counts)
        arrays["ids"][: len(ids)] = ids
        arrays["segment_ids"][: len(ids)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        arrays["positions"][: len(ids)] = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
        arrays["predict_at"][: len(counted)] = counted - 1
        arrays["targets"][: len(counted)] = ids[counted]
        arrays["weights"][: len(counted)] = 1

    def parts(self, batch_size: int) -> Iterator[Batch]:
        """Yields all rows, by length, in batches of few shapes; weights of 0 fill up the last."""
        rows = np.argsort(self.groups, kind="stable")
        for first in range(0, len(self), batch_size):
            part = self.take(np.resize(rows[first : first + batch_size], batch_size))
            part["weights"][len(self) - first :] = 0
            yield part

    def tokens(self, batch: Batch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return int((batch["segment_ids"] > 0).sum())

    def name(self, row: int) -> str:
        """Returns the rows of the data that are in a sequence: "row 3, row 7"."""
        numbers = self.numbers[self.firsts[row] : self.firsts[row + 1]]
        return ", ".join(f"row {number}" for number in numbers.tolist())

    def digest(self) -> str:
        """Returns a fingerprint of all rows: a resumed run must go on with the same."""
        sha = hashlib.sha256(f"{self.lengths}{self.predicted}".encode())
        for array in (self.tokens_of_all, self.counts_of_all, self.starts, self.firsts):
            sha.update(f"{array.shape}".encode() + array.tobytes())
        return sha.hexdigest()

    def by_name(self) -> Batch:
        """Returns all rows as one batch."""
        return self.take(np.arange(len(self)))

    # All rows, padded alike: for a look at them.
    ids = property(lambda self: self.by_name()["ids"])
    segment_ids = property(lambda self: self.by_name()["segment_ids"])
    positions = property(lambda self: self.by_name()["positions"])
    predict_at = property(lambda self: self.by_name()["predict_at"])
    targets = property(lambda self: self.by_name()["targets"])
    weights = property(lambda self: self.by_name()["weights"])


def pack(sequences: Sequence[Tokens], seq_len: int, *, packing: bool) -> Packs:
    """Returns one sequence a row or, with `packing`, as many as fit; see `first_fit`.

    Rows are as long as the longest needs, and no longer than `seq_len`. Without packing, batches
    have one of a few lengths; see `few_lengths`.
    """
    sizes = [len(tokens) for tokens in sequences]
    if packing:
        rows = first_fit(sizes, seq_len)
        sequences = [sequences[index] for members in rows for index in members]
        sizes = [len(tokens) for tokens in sequences]
        firsts = np.cumsum([0, *map(len, rows)])
    else:
        firsts = np.arange(len(sequences) + 1)
    starts = np.cumsum([0, *sizes])
    rounded = round_up(np.diff(starts[firsts]), seq_len)
    lengths = (int(rounded.max()),) if packing else few_lengths(rounded)
    counts = np.concatenate([tokens.counts for tokens in sequences]).astype(bool)
    predicted = counts.copy()
    predicted[starts[:-1]] = False
    of_rows = np.diff(np.concatenate([[0], np.cumsum(predicted)])[starts[firsts]])
    groups = np.searchsorted(lengths, np.diff(starts[firsts]))
    most = [int(of_rows[groups <= group].max(initial=1)) for group in range(len(lengths))]
    return Packs(
        tokens_of_all=np.concatenate([tokens.ids for tokens in sequences]).astype(np.int32),
        counts_of_all=counts,
        starts=starts,
        firsts=firsts,
        numbers=np.array([tokens.row for tokens in sequences]),
        lengths=lengths,
        predicted=tuple(int(round_up(m, length)) for m, length in zip(most, lengths, strict=True)),
    )


def round_up(lengths: Any, most: int) -> Any:
    """Returns lengths that suit devices, none above `most`: multiples of 8, or of 128 if long."""
    multiple = np.where(np.asarray(lengths) < _LONG, _MULTIPLE, _MULTIPLE_OF_LONG)
    return np.minimum(most, -(-lengths // multiple) * multiple)


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order of `n` rows in an epoch: [n], a permutation."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


def order_by_group(seed: int, epoch: int, groups: np.ndarray, rows_a_step: int) -> np.ndarray:
    """Returns an order in which most steps have rows of one group: [n], a permutation.

    Rows are drawn, sorted by group, and cut into steps, whose order is drawn. As many steps as
    there are groups, less one, lie across a border; the step that spans two epochs is drawn from
    all rows. The very first step has the largest group: a batch that is too large fails at once.

    Args:
      seed, epoch: of the draw.
      groups: [n], the group of each row.
      rows_a_step: rows that a step sees.
    """
    rows = order(seed, epoch, len(groups))
    first = -epoch * len(groups) % rows_a_step  # the rows before it end the last epoch's last step
    n_steps = (len(groups) - first) // rows_a_step
    if n_steps < 2 or (groups == groups[0]).all():
        return rows
    inner = rows[first : first + n_steps * rows_a_step]
    steps = inner[np.argsort(groups[inner], kind="stable")].reshape(n_steps, rows_a_step)
    turns = np.random.Generator(np.random.PCG64([seed, epoch, 1])).permutation(n_steps)
    if epoch == 0:
        turns = np.concatenate([[n_steps - 1], turns[turns != n_steps - 1]])
    inner[:] = steps[turns].ravel()  # a view of `rows`
    return rows


@dataclasses.dataclass(frozen=True)
class Order:
    """Says which of `n_rows` a step takes. Epochs follow one another without a gap or a rest.

    Attributes:
      seed: of the draw.
      n_rows: the number of rows.
      batch_size: rows in memory at once.
      accumulate: batches of a step.
      groups: [n_rows], which rows share a step where they can (see `order_by_group`); None for
        any.
    """

    seed: int
    n_rows: int
    batch_size: int
    accumulate: int = 1
    groups: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    _orders: dict[int, np.ndarray] = dataclasses.field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @classmethod
    def of(cls, examples: Examples, seed: int, batch_size: int, accumulate: int = 1) -> "Order":
        """Returns the order of examples, those of one length together."""
        return cls(seed, len(examples), batch_size, accumulate, examples.groups)

    @property
    def rows_a_step(self) -> int:
        """Returns how many rows one optimiser step sees."""
        return self.batch_size * self.accumulate

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows of the step after `step` steps: [accumulate, batch_size]."""
        taken = step * self.rows_a_step + np.arange(self.rows_a_step)
        epochs, within = np.divmod(taken, self.n_rows)
        pairs = zip(epochs.tolist(), within.tolist(), strict=True)
        rows = [self._order(epoch)[i] for epoch, i in pairs]
        return np.array(rows).reshape(self.accumulate, self.batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # an epoch and its neighbour
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = (
                order(self.seed, epoch, self.n_rows)
                if self.groups is None
                else order_by_group(self.seed, epoch, self.groups, self.rows_a_step)
            )
        return self._orders[epoch]

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
