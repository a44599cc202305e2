"""The arrays of an adapted weight, and the roles of their axes: the one table of their layout.

Everything that moves, slices, shards, joins or saves the arrays of a weight reads their axes here.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.axes import Label

Role = Label | Literal["rank", "example", "token", "u"]
Axes = tuple[int, ...]
STATIC = {"static": True}  # metadata of a dataclass's field that is no child of the pytree
RANK = -1  # in a layout, the entry for the rank, which is no axis of the weight
EXAMPLE = -2  # likewise, the entry for the examples of a batch
TOKEN = -3  # likewise, the entry for the tokens of an example
U = -4  # likewise, the entry for the numbers that TinyLoRA trains

# Batch axes come first, in the order that the weight has them in, then the rank, then the in axes
# or the out axes. A is stored transposed: see `lora_jax.core.product`.
AXES: dict[str, tuple[Role, ...]] = {
    "a": ("batch", "rank", "in"),
    "b": ("batch", "rank", "out"),
    "start_a": ("batch", "rank", "in"),
    "start_b": ("batch", "rank", "out"),
    "scale": ("batch",),
    "key": ("batch",),  # of dropout
    # One more factor for each column of A; of a bank: 0 for the columns of adapters not chosen.
    "lambda_d": ("batch", "rank"),
    "rows": ("example", "rank"),  # 1 for the columns of each example's adapter, 0 for others
    "active": ("example", "token"),  # True for the tokens that see the adapter
    "gain": ("batch", "out"),
    "shift": ("batch", "out"),
    # In the place of a and b, one pair for a whole stack, and what stands around B.
    "shared_a": ("rank", "in"),
    "shared_b": ("rank", "out"),
    "lambda_b": ("batch", "out"),  # one more factor for each column of B
    "latent": ("batch", "rank", "rank"),  # R, between A and B
    "seed": (),  # that a shared pair or a projection was drawn from
    # TinyLoRA's fixed random matrices: `latent` is their sum, each times a number of its vector.
    "projection": ("batch", "u", "rank", "rank"),
}
# Where weights are joined, the value of a part that one of them lacks; 0 for parts not named here.
NEUTRAL = {"gain": 1.0, "lambda_d": 1.0}


def layout(axes: Sequence[Role], labels: Sequence[Label]) -> Axes:
    """Returns the weight's axis for each axis of an array, a negative number where it is none.

    Args:
      axes: the roles of the array's axes, as in `AXES`.
      labels: the role of each axis of the weight.
    """
    places: dict[Role, Axes] = {
        "rank": (RANK,),
        "example": (EXAMPLE,),
        "token": (TOKEN,),
        "u": (U,),
    }
    for role in ("batch", "in", "out"):
        places[role] = tuple(axis for axis, label in enumerate(labels) if label == role)
    return tuple(axis for role in axes for axis in places[role])


def sizes(
    axes: Sequence[Role], shape: Sequence[int], labels: Sequence[Label], rank: int, u: int = 0
) -> Axes:
    """Returns the shape of an array of a weight of this shape, rank and u; see `layout`."""
    others = {RANK: rank, U: u}
    return tuple(others[a] if a in others else shape[a] for a in layout(axes, labels))


def spread(array: jax.Array, axes: Axes, where: Mapping[int, int], ndim: int) -> jax.Array:
    """Returns an array in the layout of another one, of size one along axes that it lacks.

    Args:
      array: with an axis for each of `axes`.
      axes: the weight's axis that each of them holds; those not in `where` are of size one.
      where: by the weight's axis, an axis of the result.
      ndim: the number of axes of the result.
    """
    array = lax.squeeze(array, [i for i, axis in enumerate(axes) if axis not in where])
    kept = [where[axis] for axis in axes if axis in where]
    array = lax.transpose(array, sorted(range(len(kept)), key=kept.__getitem__))
    return lax.expand_dims(array, [axis for axis in range(ndim) if axis not in kept])


def rank_axis(axes: Sequence[Role], labels: Sequence[Label]) -> int:
    """Returns the axis of an array that holds the rank, -1 where it has none."""
    places = layout(axes, labels)
    return places.index(RANK) if RANK in places else -1


def filled(array: jax.Array, axis: int, rank: int) -> jax.Array:
    """Returns an array with zeros up to a rank along an axis, counted from either end.

    With the axis -1, as `rank_axis` returns for an array without the rank, it stays as it is.
    """
    if axis == -1 or array.shape[axis] == rank:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - array.shape[axis])
    return jnp.pad(array, widths)


@functools.partial(jax.jit, static_argnames=("ranks", "axis"))
def unpadded(array: jax.Array, ranks: Sequence[int], axis: int) -> jax.Array:
    """Returns the layers of a stack one after the other along the rank, without padding.

    Args:
      array: [layers, …, rank, …].
      ranks: ranks of each layer, as a tuple.
      axis: axis of the rank.
    """
    at = (slice(None),) * (axis - 1)
    return jnp.concatenate([array[i][(*at, slice(r))] for i, r in enumerate(ranks)], axis - 1)


def cleared(array: jax.Array, ranks: Sequence[int], axis: int) -> jax.Array:
    """Returns an array with zeros in its padding, beyond each layer's own rank along an axis."""
    if len(set(ranks)) == 1:
        return array
    own = np.array(ranks, np.int32).reshape(-1, *[1] * (array.ndim - 1))
    return jnp.where(lax.broadcasted_iota(jnp.int32, array.shape, axis) < own, array, 0)


def padded(array: np.ndarray, ranks: Sequence[int], axis: int) -> np.ndarray:
    """Returns the inverse of `unpadded`: each layer's rank is filled up with zeros."""
    rows = np.moveaxis(array, axis - 1, 0)
    is_used = np.arange(max(ranks)) < np.array(ranks)[:, None]
    stack = np.zeros((*is_used.shape, *rows.shape[1:]), array.dtype)
    stack[is_used] = rows
    return np.moveaxis(stack, 1, axis)
