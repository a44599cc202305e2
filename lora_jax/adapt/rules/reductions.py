"""The rule for sums over axes of a weight; a product by broadcasting ends in one.

``(x[..., None] * w).sum(-2)`` scales a stack of copies of W, one for each row of x, along its in
axes (see `lora_jax.adapt.rules.arithmetic`), and then sums over these.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.arithmetic import scale_in_a
from lora_jax.core.axes import Label
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import wide
from lora_jax.core.parts import RANK, Axes
from lora_jax.core.product import dropped, is_dropped
from lora_jax.core.types import Outcome


def _reduce_sum(_: Interpreter, use: Use) -> Outcome:
    """Sums A over in axes and B over out axes; where no axis of a role is left, forms AB.

    AB is then a product by broadcasting, or a row or column of sums: no larger than the output.
    """
    (weight,) = use.values
    over = {weight.labels[axis] for axis in use.params["axes"]}
    if not weight.parts or weight.uses == "lookup" or use.params.get("out_sharding") is not None:
        return None
    if "out" in over and (weight.gain is not None or weight.shift is not None):
        return None
    weight = weight.formed()
    axes = tuple(axis for axis in use.params["axes"] if weight.labels[axis] != "batch")
    stack = tuple(axis for axis in use.params["axes"] if weight.labels[axis] == "batch")
    roles: tuple[Label, Label] = ("in", "out")
    gone = [role for role in roles if set(weight.axes(role)) <= set(axes)]
    if gone:
        return _contracted(use, _dropped(weight, gone[0]), axes, stack)
    if is_dropped(weight) or (stack and (weight.gain is not None or weight.shift is not None)):
        return None
    (base,) = use.bind(use.bases)
    ranks = math.prod(weight.base.shape[axis] for axis in stack) * weight.rank
    summed = _without(weight, axes)
    if stack and ranks > min(math.prod(summed.sizes("in")), math.prod(summed.sizes("out"))):
        return None  # more columns of rank than W has rows or columns
    whole = _ranks_together(summed, [axis - sum(a < axis for a in axes) for axis in stack])
    return [whole.replace(base=base)]


def _contracted(use: Use, weight: Factored, axes: Sequence[int], stack: Sequence[int]) -> Outcome:
    """Returns the sum of W + s·AB over all axes of a role, and over axes of its stack."""
    if stack and weight.gain is not None:
        return None
    (total,) = use.bind(use.bases)
    part = _without(weight, axes)
    stack = [axis - sum(a < axis for a in axes) for axis in stack]
    dtype = wide(total.dtype)
    result = total.astype(dtype) + jnp.sum(part.delta(dtype), axis=tuple(stack))
    if part.gain is not None:
        result *= part.spread_columns(part.gain).astype(dtype)
    if part.shift is not None:
        result += jnp.sum(part.spread_columns(part.shift).astype(dtype), axis=tuple(stack))
    return [result.astype(total.dtype)]


def _without(weight: Factored, axes: Sequence[int]) -> Factored:
    """Returns the weight, A and B summed over in and out axes; its base is not changed."""

    def summed(array: jax.Array, held: Axes) -> jax.Array:
        places = tuple(place for place, axis in enumerate(held) if axis in axes)
        return jnp.sum(array, axis=places) if places else array

    labels = [label for axis, label in enumerate(weight.labels) if axis not in axes]
    shape = [n for axis, n in enumerate(weight.base.shape) if axis not in axes]
    base = jax.ShapeDtypeStruct(tuple(shape), weight.base.dtype)
    return weight.along(base, summed).replace(labels=labels)


def _ranks_together(weight: Factored, stack: Sequence[int]) -> Factored:
    """Returns the sum of the weights of a stack: their ranks lie side by side."""
    if not stack:
        return weight
    weight = scale_in_a(weight)
    first = len(weight.axes("batch")) - len(stack)

    def together(array: jax.Array, held: Axes) -> jax.Array:
        places = [held.index(axis) for axis in stack]
        if RANK not in held:  # the scales, which are one
            return array[tuple(0 if i in places else slice(None) for i in range(array.ndim))]
        array = jnp.moveaxis(array, places, range(first, first + len(stack)))
        last = first + len(stack) + 1
        return array.reshape(*array.shape[:first], -1, *array.shape[last:])

    labels = [label for axis, label in enumerate(weight.labels) if axis not in stack]
    return weight.replace(key=None).along(weight.base, together).replace(labels=labels)


def _dropped(weight: Factored, role: Label) -> Factored:
    """Returns the weight with dropout in the factor whose axes are summed, as x has it."""
    if not is_dropped(weight):
        return weight
    name = "a" if role == "in" else "b"
    factor = weight.parts[name]
    shape = [
        1 if axis == RANK else n for axis, n in zip(weight.layout(name), factor.shape, strict=True)
    ]
    return weight.replace(**{name: factor * dropped(jnp.ones(shape, factor.dtype), weight)})


REDUCTION_RULES: dict[str, Rule] = {"reduce_sum": _reduce_sum}
