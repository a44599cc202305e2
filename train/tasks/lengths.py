"""Says how rows are padded."""

from collections.abc import Sequence


def padding_line(n: int, rows: str, lengths: Sequence[int], filled: float) -> str:
    """Returns the lengths of batches, and how full they are, in words.

    Args:
      n: the number of rows.
      rows: what they are called: "texts".
      lengths: that batches are padded to, ascending.
      filled: the share that is no padding.
    """
    share = f"{100 * filled:.1f}% filled"
    if len(lengths) == 1:
        return f"{n:,} {rows} are padded to {lengths[0]} tokens, {share}"
    return (
        f"{n:,} {rows} are batched by length: {len(lengths)} lengths, "
        f"{', '.join(map(str, lengths))}, {share}; the step is compiled for each when it comes"
    )
