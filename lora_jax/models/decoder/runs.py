"""The stacks of a decoder's layers: layers of one kind, in patterns that repeat."""

from collections.abc import Sequence
from typing import NamedTuple


class LayerKind(NamedTuple):
    """The parameters that a layer has: layers of one kind are stacked.

    Attributes:
      linear: a ``GatedDeltaNet`` in the place of attention.
      sparse: experts in the place of an MLP.
      whole: it sees all tokens, by heads whose sizes are not those of layers with a window.
      reuses: it has no keys and values of its own, but those of a layer before it.
    """

    linear: bool = False
    sparse: bool = False
    whole: bool = False
    reuses: bool = False


def runs_of(
    kinds: Sequence[LayerKind], first: int, names: tuple[str, str]
) -> dict[str, dict[str, range]]:
    """Returns the layers as runs of stacks that take turns: name -> place -> layers' numbers.

    One run, "", has all layers, unless the first ones are another. In each, the shortest pattern of
    kinds that repeats has the places, such as "0of4": layers 0, 4, 8, …; "" if all are alike.

    Args:
      kinds: the layers'.
      first: the number of layers in the first run.
      names: names of two runs.
    """
    n = len(kinds)
    parts = dict(zip(names, (range(first), range(first, n)), strict=True))
    runs = {}
    for name, numbers in (parts if 0 < first < n else {"": range(n)}).items():
        own, size = tuple(kinds[i] for i in numbers), len(numbers)
        period = next(p for p in range(1, size + 1) if own == own[:p] * (size // p))
        runs[name] = {
            f"{i}of{period}" if period > 1 else "": numbers[i::period] for i in range(period)
        }
    return runs
