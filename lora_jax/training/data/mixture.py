"""Mixes several data sets in proportions, by the number of rows that an epoch draws of each."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lora_jax.training.errors import TrainingError

_DATA_SET_STREAM = 2  # of draws within a data set; other streams draw orders of an epoch


def draw_row_order(seed: int, epoch: int, n: int, *stream: int) -> np.ndarray:
    """Returns a random order of `n` rows for an epoch, [n], which depends on the stream."""
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
        """Returns the number of rows in each data set: [parts]."""
        return tuple(np.diff([0, *self.ends]).tolist())

    @property
    def often(self) -> np.ndarray:
        """Returns the mean number of times that an epoch draws each row: [all rows]."""
        return np.repeat(np.array(self.drawn) / np.array(self.sizes), self.sizes)

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the rows of an epoch, in random order: [n_rows]."""
        rows_of_data_sets: list[np.ndarray] = []
        for data_set, (end, size, n_drawn) in enumerate(
            zip(self.ends, self.sizes, self.drawn, strict=True)
        ):
            # Draws are counted from the first epoch on; a pass over the data set has `size` draws.
            first_draw = epoch * n_drawn
            end_draw = first_draw + n_drawn
            passes = range(first_draw // size, -(-end_draw // size))
            orders = [
                draw_row_order(seed, number, size, _DATA_SET_STREAM, data_set) for number in passes
            ]
            pass_draw = passes.start * size
            draws = np.concatenate(orders)[first_draw - pass_draw : end_draw - pass_draw]
            rows_of_data_sets.append(end - size + draws)
        all_rows = np.concatenate(rows_of_data_sets)
        drawn_rows: np.ndarray = all_rows[draw_row_order(seed, epoch, self.n_rows)]
        return drawn_rows


def allot_rows(
    names: Sequence[str], weights: Sequence[float], *, rows: Sequence[int], units: Sequence[int]
) -> Shares:
    """Returns the number of rows that an epoch draws of each data set.

    Args:
      names: names of the data sets, for messages.
      weights: positive, in any unit.
      rows: the rows that each data set has.
      units: the packed sequences (or rows) to draw from in each data set. Weights are about rows,
        however many of them are packed into a sequence.

    Raises:
      TrainingError: an epoch would have no row of a data set.
    """
    total_weight = np.array(weights, np.float64).sum()
    drawn_rows = sum(rows) * np.array(weights, np.float64) / total_weight
    drawn_units = np.rint(drawn_rows * np.array(units) / np.array(rows)).astype(int)
    for name, weight, n_drawn in zip(names, weights, drawn_units.tolist(), strict=True):
        if n_drawn < 1:
            raise TrainingError(
                f"{name}: its weight {weight:g} of {total_weight:g} is less than one row in the "
                f"{sum(rows):,} rows of an epoch. Increase its weight, or remove the data set."
            )
    return Shares(ends=tuple(np.cumsum(units).tolist()), drawn=tuple(drawn_units.tolist()))
