"""Mixes several data sets in proportions: how many rows of each an epoch draws."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lora_jax.training.errors import TrainingError

_OF_PARTS = 2  # the stream of draws within a data set; others draw orders of an epoch


def order(seed: int, epoch: int, n: int, *stream: int) -> np.ndarray:
    """Returns the order of `n` rows in an epoch, [n]: a permutation that depends on the stream."""
    return np.random.Generator(np.random.PCG64([seed, epoch, *stream])).permutation(n)


@dataclasses.dataclass(frozen=True)
class Shares:
    """The number of rows of each data set that an epoch draws.

    Rows of a data set are drawn in passes over it, each in an order of its own, and an epoch goes
    on where the last one ended: after any number of epochs, one row of a data set came at most once
    more often than another. Within an epoch all rows are shuffled. The draw depends on the seed and
    the epoch alone.

    Attributes:
      ends: [parts], the end of each data set among the rows of all.
      drawn: [parts], the rows of each in an epoch.
    """

    ends: tuple[int, ...]
    drawn: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Returns the number of rows of an epoch."""
        return sum(self.drawn)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Returns the number of rows that each data set has: [parts]."""
        return tuple(np.diff([0, *self.ends]).tolist())

    @property
    def often(self) -> np.ndarray:
        """Returns the times that an epoch has each row, on average: [rows of all]."""
        return np.repeat(np.array(self.drawn) / np.array(self.sizes), self.sizes)

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the rows of an epoch, in a drawn order: [n_rows]."""
        row_blocks: list[np.ndarray] = []
        begins = (0, *self.ends[:-1])
        parts = zip(begins, self.sizes, self.drawn, strict=True)
        for part, (begin, size, drawn) in enumerate(parts):
            first, last = epoch * drawn, (epoch + 1) * drawn
            passes = range(first // size, -(-last // size))
            orders = [order(seed, number, size, _OF_PARTS, part) for number in passes]
            offset = passes.start * size
            row_blocks.append(begin + np.concatenate(orders)[first - offset : last - offset])
        drawn_rows: np.ndarray = np.concatenate(row_blocks)[order(seed, epoch, self.n_rows)]
        return drawn_rows


def shares_of(
    names: Sequence[str], weights: Sequence[float], *, rows: Sequence[int], units: Sequence[int]
) -> Shares:
    """Returns the number of rows that an epoch draws of each data set; in all as many as exist.

    Args:
      names: names of the data sets, for messages.
      weights: positive, in any unit.
      rows: the rows that each data set has.
      units: the packed sequences (or rows) to draw from in each data set. Weights are about rows,
        however many of them are packed into a sequence.

    Raises:
      TrainingError: an epoch would have no row of a data set.
    """
    asked = np.array(weights, np.float64)
    of_rows = sum(rows) * asked / asked.sum()
    drawn = np.rint(of_rows * np.array(units) / np.array(rows)).astype(int)
    for name, weight, n in zip(names, weights, drawn.tolist(), strict=True):
        if n < 1:
            raise TrainingError(
                f"{name}: its weight {weight:g} of {asked.sum():g} is less than one in the "
                f"{sum(rows):,} rows of an epoch: give it a larger weight, or leave it out"
            )
    return Shares(tuple(np.cumsum(units).tolist()), tuple(drawn.tolist()))
