"""Batches of fixed shape; which sequences a batch holds is a function of the seed and the step."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

Batch = dict[str, np.ndarray]

_MULTIPLE = 8  # lengths are rounded up to it: odd ones are slower on every device


@dataclasses.dataclass(frozen=True)
class Examples:
    """Holds arrays of one length, from which batches are taken.

    Attributes:
      weights: [n] or [n, m], what each unit of the loss is multiplied by; 0 for one that does not
        count. Negative ones are welcome.
    """

    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, rows: np.ndarray) -> Batch:
        """Returns the rows at the indices `rows`, of any shape: arrays [*rows.shape, …]."""
        return {name: array[rows] for name, array in self._arrays().items()}

    def parts(self, batch_size: int) -> Iterator[Batch]:
        """Yields all rows in order, in batches of one shape; weights of 0 fill up the last."""
        for first in range(0, len(self), batch_size):
            rows = np.arange(first, first + batch_size)
            part = self.take(rows % len(self))
            real = rows < len(self)
            part["weights"] = part["weights"] * real.reshape(-1, *[1] * (self.weights.ndim - 1))
            yield part

    def tokens(self, batch: Batch) -> int:
        """Returns the number of tokens in a batch, without padding; here, of units that count."""
        return int(np.count_nonzero(batch["weights"]))

    def digest(self) -> str:
        """A fingerprint of all rows: a resumed run must go on with the same."""
        sha = hashlib.sha256()
        for name, array in self._arrays().items():
            sha.update(f"{name}{array.shape}".encode() + array.tobytes())
        return sha.hexdigest()

    def _arrays(self) -> dict[str, np.ndarray]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One training sequence: `ids` [n] int32, and `counts` [n] bool, True where the loss counts."""

    ids: np.ndarray
    counts: np.ndarray
    row: int = 0  # of the data, counted from 1

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Packs(Examples):
    """Sequences ready to be batched: int32, [n, seq] and, of the predictions that count, [n, m].

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


def pack(sequences: Sequence[Tokens], seq_len: int, *, packing: bool) -> Packs:
    """One sequence a row or, with `packing`, as many as fit (first fit, the longest first).

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
    """A length that suits devices: a multiple of eight, and no more than `most`."""
    return min(most, -(-int(length) // _MULTIPLE) * _MULTIPLE)


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` rows in an epoch: [n], a permutation."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


@dataclasses.dataclass(frozen=True)
class Order:
    """The rows, out of `n_rows`, of each step. Epochs follow one another without a gap."""

    seed: int
    n_rows: int
    batch_size: int
    accumulate: int = 1

    @property
    def rows_a_step(self) -> int:
        """The number of rows per optimiser step."""
        return self.batch_size * self.accumulate

    def rows(self, step: int) -> np.ndarray:
        """The rows of the step that has `step` steps before it: [accumulate, batch_size]."""
        taken = step * self.rows_a_step + np.arange(self.rows_a_step)
        epochs, within = np.divmod(taken, self.n_rows)
        orders = {epoch: order(self.seed, epoch, self.n_rows) for epoch in set(epochs.tolist())}
        rows = [orders[epoch][i] for epoch, i in zip(epochs.tolist(), within, strict=True)]
        return np.array(rows).reshape(self.accumulate, self.batch_size)

    def cursor(self, step: int) -> dict[str, int]:
        """Returns the position in the data after `step` steps, as epoch and row."""
        epoch, row = divmod(step * self.rows_a_step, self.n_rows)
        return {"epoch": epoch, "row": row}

    def steps(self, epochs: float) -> int:
        """The number of steps that see every row `epochs` times."""
        return max(1, -(-int(np.ceil(epochs * self.n_rows)) // self.rows_a_step))
