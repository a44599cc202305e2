"""The layout of an adapted weight's arrays: the axis roles of each, in one table.

Everything that moves, slices, shards, joins or saves the arrays of a weight reads their axes here.
The **layout** of an array is the weight's axis that each of its axes holds. An axis that the weight
lacks (the rank, examples, tokens, TinyLoRA's u) has a negative number there: `RANK`, `EXAMPLE`, …
Where the layers of a stack differ in rank, all are stored with the largest; the zeros beyond a
layer's own rank are its **padding**.
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
# Entries of a layout for axes that the weight lacks.
RANK = -1
EXAMPLE = -2  # the examples of a batch
TOKEN = -3  # the tokens of an example
U = -4  # the elements of the vector that TinyLoRA trains

# Batch axes come first, in the order of the weight, then the rank, then the in axes or the out
# axes. A is stored transposed: see `lora_jax.core.product`.
AXES: dict[str, tuple[Role, ...]] = {
    "a": ("batch", "rank", "in"),
    "b": ("batch", "rank", "out"),
    "start_a": ("batch", "rank", "in"),
    "start_b": ("batch", "rank", "out"),
    "scale": ("batch",),
    "key": ("batch",),  # of dropout
    # One more factor for each column of A. In a bank, 0 for the columns of adapters not chosen.
    "lambda_d": ("batch", "rank"),
    "rows": ("example", "rank"),  # 1 for the columns of each example's adapter, 0 for others
    "active": ("example", "token"),  # True for the tokens that see the adapter
    "gain": ("batch", "out"),
    "shift": ("batch", "out"),
    # In place of a and b: one pair for a whole stack, and the small arrays before and after B.
    "shared_a": ("rank", "in"),
    "shared_b": ("rank", "out"),
    "lambda_b": ("batch", "out"),  # one more factor for each column of B
    "latent": ("batch", "rank", "rank"),  # R, between A and B
    "seed": (),  # the seed that a shared pair or a projection was drawn from
    # TinyLoRA's fixed random matrices: `latent` is their sum, each times a number of its vector.
    "projection": ("batch", "u", "rank", "rank"),
}
# Where weights are joined, the value of a part that one of them lacks. Parts not named here: 0.
NEUTRAL = {"gain": 1.0, "lambda_d": 1.0}


def layout_of_axes(axes: Sequence[Role], labels: Sequence[Label]) -> Axes:
    """Returns, for each axis of an array, the weight's axis, or a negative number for others.

    Args:
      axes: the roles of the array's axes, as in `AXES`.
      labels: the role of each axis of the weight.
    """
    axes_of_role: dict[Role, Axes] = {
        "rank": (RANK,),
        "example": (EXAMPLE,),
        "token": (TOKEN,),
        "u": (U,),
    }
    for role in ("batch", "in", "out"):
        axes_of_role[role] = tuple(axis for axis, label in enumerate(labels) if label == role)
    return tuple(axis for role in axes for axis in axes_of_role[role])


def shape_of_axes(
    axes: Sequence[Role], shape: Sequence[int], labels: Sequence[Label], rank: int, u: int = 0
) -> Axes:
    """Returns the shape of one of a weight's arrays.

    Args:
      axes: the roles of the array's axes, as in `AXES`.
      shape: the shape of the weight.
      labels: the role of each axis of the weight.
      rank: r, as the factors are stored.
      u: the length of the vector that TinyLoRA trains.

    Raises:
      ValueError: the array is a mask of examples or tokens, whose numbers no weight tells.
    """
    size_of_axis = {RANK: rank, U: u, **dict(enumerate(shape))}
    array_layout = layout_of_axes(axes, labels)
    if not size_of_axis.keys() >= {*array_layout}:
        raise ValueError(
            f"The shape {tuple(shape)} of a weight does not determine the sizes of the axes {axes}."
        )
    return tuple(size_of_axis[axis] for axis in array_layout)


def align_to_axes(
    array: jax.Array, axes: Axes, result_axes: Mapping[int, int], ndim: int
) -> jax.Array:
    """Transposes an array to a result's axes, with size one along axes that it lacks.

    Args:
      array: the array; it has size one along each axis of the weight not in `result_axes`.
      axes: the layout of the array.
      result_axes: the axis of the result, by axis of the weight.
      ndim: the number of axes of the result.
    """
    # Drop the axes that the result lacks, sort the others, and insert those that the array lacks.
    dropped_axes = [index for index, axis in enumerate(axes) if axis not in result_axes]
    array = lax.squeeze(array, dropped_axes)
    array_axes = [result_axes[axis] for axis in axes if axis in result_axes]
    order = sorted(range(array.ndim), key=lambda index: array_axes[index])
    array = lax.transpose(array, order)
    return lax.expand_dims(array, [axis for axis in range(ndim) if axis not in array_axes])


def rank_axis(axes: Sequence[Role], labels: Sequence[Label]) -> int:
    """Returns the rank axis of an array, or -1 if it has none."""
    array_layout = layout_of_axes(axes, labels)
    return array_layout.index(RANK) if RANK in array_layout else -1


def pad_rank(array: jax.Array, axis: int, rank: int) -> jax.Array:
    """Pads an array with zeros along the rank axis.

    Args:
      array: the array.
      axis: the axis of the rank, as `rank_axis` returns it; with -1 the array is returned as it is.
      rank: the size of that axis in the result.
    """
    if axis == -1 or array.shape[axis] == rank:
        return array
    pad_width = [(0, 0)] * array.ndim
    pad_width[axis] = (0, rank - array.shape[axis])
    return jnp.pad(array, pad_width)


@functools.partial(jax.jit, static_argnames=("ranks", "axis"))
def join_layers_unpadded(array: jax.Array, ranks: Sequence[int], axis: int) -> jax.Array:
    """Concatenates the layers of a stack along the rank, without padding.

    Args:
      array: [layers, …, rank, …].
      ranks: rank of each layer, as a tuple.
      axis: axis of the rank.

    Returns:
      [(axes before the rank)…, sum of ranks, …].
    """
    rank_axis_of_layer = axis - 1
    layers = [
        lax.slice_in_dim(array[index], 0, rank, axis=rank_axis_of_layer)
        for index, rank in enumerate(ranks)
    ]
    return jnp.concatenate(layers, rank_axis_of_layer)


def zero_rank_padding(array: jax.Array, ranks: Sequence[int], axis: int) -> jax.Array:
    """Returns an array with its padding along a rank axis set to zero."""
    if len(set(ranks)) == 1:
        return array
    rank_of_layer = np.array(ranks, np.int32).reshape(-1, *[1] * (array.ndim - 1))
    rank_index = lax.broadcasted_iota(jnp.int32, array.shape, axis)
    return jnp.where(rank_index < rank_of_layer, array, 0)


def pad_split_layers(array: np.ndarray, ranks: Sequence[int], axis: int) -> np.ndarray:
    """Undoes `join_layers_unpadded`: returns a stack with layers padded to the largest rank."""
    columns_of_a = np.moveaxis(array, axis - 1, 0)  # [sum of ranks, …]
    is_in_rank = np.arange(max(ranks)) < np.array(ranks)[:, None]  # [layers, largest rank]
    stack = np.zeros((*is_in_rank.shape, *columns_of_a.shape[1:]), array.dtype)
    stack[is_in_rank] = columns_of_a
    return np.moveaxis(stack, 1, axis)
