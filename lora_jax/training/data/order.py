"""The order of examples: the rows of each step, as a function of the seed and the step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from lora_jax.training.data.batches import Examples, HostBatch
from lora_jax.training.data.mixture import Shares, draw_row_order

Item = TypeVar("Item")

_NAMED_ROWS = 32  # rows of a batch that a message names


def order_by_group(
    seed: int, epoch: int, groups: np.ndarray, rows_a_step: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """Returns an order in which the rows of most steps belong to one group: [m].

    Rows are drawn, sorted by group, and cut into steps, whose order is drawn. As many steps as
    there are groups, less one, lie across a border; the step that spans two epochs is drawn from
    all rows. The very first step has the largest group: a batch that is too large fails at once.

    Args:
      seed, epoch: seed and epoch of the draw.
      groups: [n], the group of each row.
      rows_a_step: rows that a step sees.
      rows: [m], the rows of the epoch, drawn; by default a permutation of all.
    """
    if rows is None:
        rows = draw_row_order(seed, epoch, len(groups))
    first = -epoch * len(rows) % rows_a_step  # the rows before it end the last epoch's last step
    draw = np.random.Generator(np.random.PCG64([seed, epoch, 1]))
    sort_by_group(rows, groups, rows_a_step, first, draw.permutation, largest_first=epoch == 0)
    return rows


def sort_by_group(
    rows: np.ndarray,
    groups: np.ndarray,
    rows_a_step: int,
    first: int,
    permutation: Callable[[int], np.ndarray],
    *,
    largest_first: bool = False,
) -> None:
    """Groups drawn rows into steps of one group each, in random order; changes `rows`.

    Args:
      rows: [m], in a drawn order.
      groups: [n], the group of each row.
      rows_a_step: rows that a step sees.
      first: the rows at the beginning that end an earlier step.
      permutation: draws the order of so many steps.
      largest_first: puts a step of the largest group first.
    """
    n_steps = (len(rows) - first) // rows_a_step
    if n_steps < 2 or (groups == groups[0]).all():
        return
    step_rows = rows[first : first + n_steps * rows_a_step]  # a view of `rows`
    rows_by_group = step_rows[np.argsort(groups[step_rows], kind="stable")]
    steps = rows_by_group.reshape(n_steps, rows_a_step)
    step_order = permutation(n_steps)
    if largest_first:
        last_step = n_steps - 1
        step_order = np.concatenate([[last_step], step_order[step_order != last_step]])
    step_rows[:] = steps[step_order].ravel()


@dataclasses.dataclass(frozen=True)
class Order:
    """The rows of each step; epochs follow one another without a partial step between them.

    Attributes:
      seed: seed of the draw.
      n_rows: the number of rows of an epoch.
      batch_size: rows in memory at once.
      accumulate: batches of a step.
      groups: groups of all rows, which ones share a step where they can (see `order_by_group`);
        None for any.
      mixture: what an epoch draws of each data set; None where it has each row once.
    """

    seed: int
    n_rows: int
    batch_size: int
    accumulate: int = 1
    groups: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    mixture: Shares | None = None

    @classmethod
    def of(cls, examples: Examples, seed: int, batch_size: int, accumulate: int = 1) -> "Order":
        """Returns the order of examples, which groups rows of equal padded length."""
        mixture = examples.mixture
        n = len(examples) if mixture is None else mixture.n_rows
        return cls(
            seed=seed,
            n_rows=n,
            batch_size=batch_size,
            accumulate=accumulate,
            groups=examples.groups,
            mixture=mixture,
        )

    @property
    def rows_a_step(self) -> int:
        """Returns the number of rows in one optimiser step."""
        return self.batch_size * self.accumulate

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows of the step with `step` steps before it: [accumulate, batch_size]."""
        draws = step * self.rows_a_step + np.arange(self.rows_a_step)  # of all epochs
        epochs, indices = np.divmod(draws, self.n_rows)
        rows = [
            self._order(epoch)[index]
            for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True)
        ]
        return np.array(rows).reshape(self.accumulate, self.batch_size)

    def seen(self, steps: int) -> tuple[int, np.ndarray]:
        """Returns the number of completed epochs after some steps, and the rows since then: [m]."""
        n_epochs, n_rows = divmod(steps * self.rows_a_step, self.n_rows)
        return n_epochs, self._order(n_epochs)[:n_rows]

    @functools.cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        """Returns a cached function from an epoch to its rows."""

        def draw_epoch(epoch: int) -> np.ndarray:
            rows = None if self.mixture is None else self.mixture.rows(self.seed, epoch)
            if self.groups is not None:
                return order_by_group(self.seed, epoch, self.groups, self.rows_a_step, rows)
            return draw_row_order(self.seed, epoch, self.n_rows) if rows is None else rows

        return functools.lru_cache(maxsize=2)(draw_epoch)

    def cursor(self, step: int) -> dict[str, int]:
        """Returns the position in the data after `step` steps."""
        epoch, row = divmod(step * self.rows_a_step, self.n_rows)
        return {"epoch": epoch, "row": row}

    def steps(self, epochs: float) -> int:
        """Returns the number of steps that cover every row `epochs` times."""
        return max(1, -(-int(np.ceil(epochs * self.n_rows)) // self.rows_a_step))


def list_rows(rows: Sequence[Item], name: Callable[[Item], str]) -> str:
    """Returns the names of a batch's rows, shortened if there are many."""
    names = ", ".join(map(name, rows[:_NAMED_ROWS]))
    if len(rows) <= _NAMED_ROWS:
        return names
    return f"{names} and {len(rows) - _NAMED_ROWS} more"


class Batches(Protocol):
    """The batches of a run, as a function of the data, the seed and the step number."""

    @property
    def batch_size(self) -> int:
        """Returns the number of rows in memory at once."""

    @property
    def n_examples(self) -> int | None:
        """Returns the number of examples; None if it is not known."""

    def batch(self, number: int) -> HostBatch:
        """Returns this process's batch for the step with `number` steps before it."""

    def first(self) -> HostBatch:
        """Returns a batch of the largest shape, for which the step is compiled first."""

    def named(self, number: int) -> str:
        """Returns the names of the rows in that batch."""

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of units in a batch, without padding."""

    def digest(self) -> str:
        """Returns a fingerprint of the data, to check that a resumed run has the same data."""

    def cursor(self, step: int) -> dict[str, int]:
        """Returns the position in the data after `step` steps."""

    def seek(self, cursor: dict[str, int], step: int) -> bool:
        """Moves to the position after `step` steps; returns False if the cursor does not fit."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches of examples in memory; see `Batches`.

    Attributes:
      examples: the examples to train on.
      order: their order.
      name: names one of them in messages.
      source: the name of all of them; "" where `name` says it.
    """

    examples: Examples
    order: Order
    name: Callable[[int], str]
    source: str = "the examples"

    @property
    def batch_size(self) -> int:
        """Returns the number of rows in memory at once."""
        return self.order.batch_size

    @property
    def n_examples(self) -> int:
        """Returns the number of examples."""
        return len(self.examples)

    def batch(self, number: int) -> HostBatch:
        """Returns this process's batch for the step with `number` steps before it."""
        return self.examples.take(self.order.rows(number))

    def first(self) -> HostBatch:
        """Returns the first batch, which has the longest rows."""
        return self.batch(0)

    def named(self, number: int) -> str:
        """Returns the names of the rows in that batch."""
        rows = self.order.rows(number).ravel().tolist()
        return list_rows(rows, self.name) + (f" of {self.source}" if self.source else "")

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of units in a batch, without padding."""
        return self.examples.tokens(batch)

    def digest(self) -> str:
        """Returns a fingerprint of the examples."""
        return self.examples.digest()

    def cursor(self, step: int) -> dict[str, int]:
        """Returns the position in the data after `step` steps."""
        return self.order.cursor(step)

    def seek(self, cursor: dict[str, int], step: int) -> bool:
        """Returns True if a cursor belongs to `step` steps; no movement is needed."""
        return cursor == self.order.cursor(step)
