"""Lines that a run prints about its examples: lengths of batches, and rows of each data set."""

from collections.abc import Sequence

import numpy as np

from lora_jax.training.data.batches import Examples, Packs
from lora_jax.training.data.order import Order


def mixture_lines(examples: Examples, order: Order, steps: int) -> tuple[str, ...]:
    """Returns a line per data set on the rows that so many steps see; () for a single one."""
    if not isinstance(examples, Packs) or not examples.sources:
        return ()
    n = len(examples.sources)
    of_units = np.zeros((len(examples), n), np.int64)  # rows of each data set in each sequence
    units = np.repeat(np.arange(len(examples)), np.diff(examples.firsts))
    np.add.at(of_units, (units, examples.table.origins), 1)
    often = np.ones(len(examples)) if order.mixture is None else order.mixture.often
    epochs, rest = order.seen(steps)
    seen = np.rint(epochs * (often @ of_units)).astype(int) + of_units[rest].sum(0)
    have = of_units.sum(0)
    return tuple(
        f"{name}: {taken:,} rows in {steps:,} steps, {100 * taken / seen.sum():.1f}% of all; "
        f"each of its {rows:,} comes {taken / rows:.2f} times on average"
        for name, taken, rows in zip(examples.sources, seen.tolist(), have.tolist(), strict=True)
    )


def measured_line(n: int, rows: str, source: str) -> str:
    """Returns the number of rows of which the held-out loss is the mean, in words."""
    return f"the held-out loss is that of {n:,} {rows} of {source}"


def padding_line(n: int, rows: str, lengths: Sequence[int], filled: float) -> str:
    """Returns the lengths of batches, and how full they are, in words.

    Args:
      n: the number of rows.
      rows: what they are called: "texts".
      lengths: the lengths that batches are padded to, ascending.
      filled: the share that is no padding.
    """
    share = f"{100 * filled:.1f}% filled"
    if len(lengths) == 1:
        return f"{n:,} {rows} are padded to {lengths[0]} tokens, {share}"
    return (
        f"{n:,} {rows} are batched by length: {len(lengths)} lengths, "
        f"{', '.join(map(str, lengths))}, {share}; the step is compiled for each when it comes"
    )
