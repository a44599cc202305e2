"""The rule for sums over axes of a weight, which also end products by broadcasting.

``(x[..., None] * w).sum(-2)`` scales a stack of copies of W, one for each row of x, along its in
axes (see `lora_jax.adapt.rules.arithmetic`), and then sums over these.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.arithmetic import has_gain_or_shift, move_scale_into_a
from lora_jax.core.axes import Label
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.parts import RANK, Axes
from lora_jax.core.product import apply_dropout, has_dropout
from lora_jax.core.types import Outcome


def _reduce_sum(_: Interpreter, use: Use) -> Outcome:
    """Sums A over in axes and B over out axes; forms AB if a role has no axis left.

    AB is then a product by broadcasting, or a row or column of sums: no larger than the output.
    """
    (weight,) = use.values
    if not weight.parts or weight.uses == "lookup" or use.params.get("out_sharding") is not None:
        return None
    summed_axes = use.params["axes"]
    has_vectors = has_gain_or_shift(weight)
    sums_columns = any(weight.labels[axis] == "out" for axis in summed_axes)
    if sums_columns and has_vectors:
        return None
    weight = weight.formed()
    matrix_axes = tuple(axis for axis in summed_axes if weight.labels[axis] != "batch")
    stack_axes = tuple(axis for axis in summed_axes if weight.labels[axis] == "batch")
    contracted_role: Label | None = None
    if set(weight.axes("in")) <= set(matrix_axes):
        contracted_role = "in"
    elif set(weight.axes("out")) <= set(matrix_axes):
        contracted_role = "out"
    if contracted_role is not None:
        return _sum_over_role(
            use, _apply_dropout_to_factor(weight, contracted_role), matrix_axes, stack_axes
        )
    if has_dropout(weight) or (stack_axes and has_vectors):
        return None
    (base,) = use.bind(use.bases)
    n_members = math.prod(weight.base.shape[axis] for axis in stack_axes)
    rank_of_sum = n_members * weight.rank
    summed = _sum_factors_over(weight, matrix_axes)
    n_rows = math.prod(summed.sizes("in"))
    n_columns = math.prod(summed.sizes("out"))
    if stack_axes and rank_of_sum > min(n_rows, n_columns):
        return None
    summed = _sum_of_members(summed, _axes_after_removal(stack_axes, matrix_axes))
    return [summed.replace(base=base)]


def _axes_after_removal(axes: Sequence[int], removed_axes: Sequence[int]) -> tuple[int, ...]:
    """Returns the indices of axes after the removal of other axes."""
    return tuple(axis - sum(removed < axis for removed in removed_axes) for axis in axes)


def _sum_over_role(
    use: Use, weight: Factored, matrix_axes: Sequence[int], stack_axes: Sequence[int]
) -> Outcome:
    """Returns the sum of W + s·AB over all axes of a role, and over stack axes."""
    if stack_axes and weight.gain is not None:
        return None
    (base_sum,) = use.bind(use.bases)
    weight = _sum_factors_over(weight, matrix_axes)
    stack_axes = _axes_after_removal(stack_axes, matrix_axes)
    dtype = accumulation_dtype(base_sum.dtype)
    result = base_sum.astype(dtype) + jnp.sum(weight.delta(dtype), axis=stack_axes)
    if weight.gain is not None:
        result *= weight.columns_in_base_layout(weight.gain).astype(dtype)
    if weight.shift is not None:
        shift = weight.columns_in_base_layout(weight.shift).astype(dtype)
        result += jnp.sum(shift, axis=stack_axes)
    return [result.astype(base_sum.dtype)]


def _sum_factors_over(weight: Factored, removed_axes: Sequence[int]) -> Factored:
    """Returns the weight with A and B summed over in and out axes; its base is a shape."""

    def sum_over_removed(array: jax.Array, layout: Axes) -> jax.Array:
        array_axes = tuple(i for i, axis in enumerate(layout) if axis in removed_axes)
        return jnp.sum(array, axis=array_axes) if array_axes else array

    remaining_axes = [axis for axis in range(len(weight.labels)) if axis not in removed_axes]
    labels = [weight.labels[axis] for axis in remaining_axes]
    shape = tuple(weight.base.shape[axis] for axis in remaining_axes)
    base = jax.ShapeDtypeStruct(shape, weight.base.dtype)
    return weight.along(base, sum_over_removed).replace(labels=labels)


def _sum_of_members(weight: Factored, stack_axes: Sequence[int]) -> Factored:
    """Returns the sum of a stack's weights, with their ranks concatenated."""
    if not stack_axes:  # nothing to sum
        return weight
    weight = move_scale_into_a(weight)
    n_summed = len(stack_axes)
    n_batch = len(weight.axes("batch")) - n_summed  # axes that stay

    def join_ranks(array: jax.Array, layout: Axes) -> jax.Array:
        """Merges the summed axes of an array into its rank axis."""
        array_axes = [layout.index(axis) for axis in stack_axes]
        if RANK not in layout:  # the scales, which are one
            first_member = [0 if i in array_axes else slice(None) for i in range(array.ndim)]
            return array[tuple(first_member)]
        array = jnp.moveaxis(array, array_axes, range(n_batch, n_batch + n_summed))
        sizes_behind_rank = array.shape[n_batch + n_summed + 1 :]
        return array.reshape(*array.shape[:n_batch], -1, *sizes_behind_rank)

    labels = [label for axis, label in enumerate(weight.labels) if axis not in stack_axes]
    return weight.replace(key=None).along(weight.base, join_ranks).replace(labels=labels)


def _apply_dropout_to_factor(weight: Factored, role: Label) -> Factored:
    """Returns the weight with dropout applied to the factor whose axes are summed."""
    if not has_dropout(weight):
        return weight
    name = "a" if role == "in" else "b"
    factor = weight.parts[name]
    shape = [
        1 if axis == RANK else size
        for axis, size in zip(weight.layout(name), factor.shape, strict=True)
    ]
    mask = apply_dropout(jnp.ones(shape, factor.dtype), weight)
    return weight.replace(**{name: factor * mask})


REDUCTION_RULES: dict[str, Rule] = {"reduce_sum": _reduce_sum}
