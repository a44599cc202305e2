"""Lines that a run prints about its examples: lengths of batches, and rows of each data set."""

from collections.abc import Sequence

import numpy as np

from lora_jax.training.data.batches import Examples, Packs
from lora_jax.training.data.order import Order


def format_mixture_lines(examples: Examples, order: Order, steps: int) -> tuple[str, ...]:
    """Returns a line per data set on the rows that `steps` steps see; () for one data set."""
    if not isinstance(examples, Packs) or not examples.sources:
        return ()
    n_datasets = len(examples.sources)
    row_counts = np.zeros((len(examples), n_datasets), np.int64)  # [sequences, data sets]
    sequence_of_row = np.repeat(np.arange(len(examples)), np.diff(examples.firsts))
    np.add.at(row_counts, (sequence_of_row, examples.table.origins), 1)
    # How often each sequence comes in whole epochs, and the sequences of the last, partial epoch.
    visits = np.ones(len(examples)) if order.mixture is None else order.mixture.often
    epochs, partial_epoch = order.seen(steps)
    rows_seen = np.rint(epochs * (visits @ row_counts)).astype(int)
    rows_seen += row_counts[partial_epoch].sum(0)
    total_rows = row_counts.sum(0)
    return tuple(
        f"{name}: {n_seen:,} rows in {steps:,} steps, {100 * n_seen / rows_seen.sum():.1f}% of "
        "all; "
        f"each of its {n_rows:,} rows comes {n_seen / n_rows:.2f} times on average"
        for name, n_seen, n_rows in zip(
            examples.sources, rows_seen.tolist(), total_rows.tolist(), strict=True
        )
    )


def format_held_out_line(n: int, rows: str, source: str) -> str:
    """Returns a sentence on the number of rows that the held-out loss averages."""
    return f"The held-out loss is the mean over {n:,} {rows} of {source}."


def format_padding_line(n: int, rows: str, lengths: Sequence[int], filled: float) -> str:
    """Returns a sentence on the lengths of batches and on their share of padding.

    Args:
      n: the number of rows.
      rows: what they are called: "texts".
      lengths: the lengths that batches are padded to, ascending.
      filled: the fraction of tokens that are not padding.
    """
    share = f"{100 * filled:.1f}% filled"
    if len(lengths) == 1:
        return f"{n:,} {rows} are padded to {lengths[0]} tokens, {share}"
    return (
        f"{n:,} {rows} are batched by length: {len(lengths)} lengths, "
        f"{', '.join(map(str, lengths))}, {share}. The step is compiled once for each length."
    )
