"""Groups a decoder's layers into stacks: layers of one kind, in repeating patterns."""

from collections.abc import Sequence
from typing import NamedTuple


class LayerKind(NamedTuple):
    """The parameters of a layer; layers of one kind are stacked.

    Attributes:
      linear: a ``GatedDeltaNet`` in the place of attention.
      sparse: experts in the place of an MLP.
      has_global_heads: it sees all tokens, by heads of other sizes than in layers with a window.
      reuses_keys: it has no keys and values of its own, but those of a layer before it.
    """

    linear: bool = False
    sparse: bool = False
    has_global_heads: bool = False
    reuses_keys: bool = False


def runs_of(
    kinds: Sequence[LayerKind], first: int, names: tuple[str, str]
) -> dict[str, dict[str, range]]:
    """Groups the layers into runs and stacks: run name -> position -> layer indices.

    One run, "", has all layers, unless the first ones are another. In each, the shortest pattern of
    kinds that repeats has the places, such as "0of4": layers 0, 4, 8, …; "" if all are alike.

    Args:
      kinds: the layers' kinds.
      first: the number of layers in the first run.
      names: names of two runs.
    """
    n_layers = len(kinds)
    layers_of_runs = {"": range(n_layers)}
    if 0 < first < n_layers:
        layers_of_runs = {names[0]: range(first), names[1]: range(first, n_layers)}
    return {run: _stacks(kinds, layers) for run, layers in layers_of_runs.items()}


def _stacks(kinds: Sequence[LayerKind], layers: range) -> dict[str, range]:
    """Groups the layers of a run into stacks: position -> layer indices; see ``runs_of``."""
    layer_kinds = tuple(kinds[i] for i in layers)
    n_layers = len(layers)
    # The shortest pattern of kinds whose repetition gives all layers.
    period = 1
    while layer_kinds != layer_kinds[:period] * (n_layers // period):
        period += 1
    if period == 1:  # all layers are of one kind
        return {"": layers}
    return {f"{i}of{period}": layers[i::period] for i in range(period)}
