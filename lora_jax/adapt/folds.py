"""Weights laid end to end in one vector, as `jax.flatten_util.ravel_pytree` lays them.

A vector has no in and out axes, so it has no factors. But a function that lays a tree out as a
vector mostly takes it apart again: it then gets back the weights that went in.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lora_jax.core.factored import Factored
from lora_jax.core.types import EqnParams, Outcome, Value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoldedVector:
    """A vector, unformed. It lives within one jaxpr, and is formed where it leaves it.

    Attributes:
      pieces: weights, each in the shape that it had, and vectors.
    """

    pieces: tuple[Value, ...]

    def formed(self, merged: Callable[[Factored], jax.Array]) -> jax.Array:
        """Returns the vector, its weights formed by `merged`."""
        arrays = [merged(p).reshape(-1) if isinstance(p, Factored) else p for p in self.pieces]
        return jnp.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def cut(self, start: int, stop: int) -> Value:
        """Returns a stretch of the vector; None where it holds a part of a piece."""
        ends = [0, *itertools.accumulate(map(_size, self.pieces))]
        if start not in ends or stop not in ends:
            return None
        pieces = self.pieces[ends.index(start) : ends.index(stop)]
        is_vector = len(pieces) == 1 and not isinstance(pieces[0], Factored)
        return pieces[0] if is_vector else FoldedVector(pieces)


def _size(piece: Value) -> int:
    return math.prod(piece.base.shape if isinstance(piece, Factored) else piece.shape)


def moved(name: str, params: EqnParams, values: Sequence[Value]) -> Outcome:
    """Returns the outputs of an equation that lays vectors together or takes them apart.

    Args:
      name: name of its primitive.
      params: the equation's.
      values: its operands, one `FoldedVector` or more among them.

    Returns:
      The outputs; None for any other equation, or where a weight is cut into.
    """
    first = values[0]
    if name == "concatenate":
        each = (v.pieces if isinstance(v, FoldedVector) else (v,) for v in values)
        return [FoldedVector(tuple(itertools.chain(*each)))]
    if name == "split":
        ends = [0, *itertools.accumulate(params["sizes"])]
        parts = [first.cut(*pair) for pair in itertools.pairwise(ends)]
        return None if any(part is None for part in parts) else parts
    if name == "slice" and params["strides"] in (None, (1,)):
        part = first.cut(*params["start_indices"], *params["limit_indices"])
        return None if part is None else [part]
    if name == "reshape" and len(first.pieces) == 1:
        (weight,) = first.pieces
        return [weight] if tuple(params["new_sizes"]) == tuple(weight.base.shape) else None
    return None
