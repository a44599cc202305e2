"""Rules for operations that are linear in a weight: its factors follow, and AB is not formed.

They scale a weight by a number or by a vector along batch and out axes (or batch and in axes), or a
copy of it for each row of such vectors; add other arrays and weights; and join kernels end to end.

A weight is *mirrored* if its in axes are read as out axes. A part is *neutral* if it changes
nothing, as a gain of ones. Weights are *aligned* if their axes have the same roles.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.core.axes import Label
from lora_jax.core.base import as_array
from lora_jax.core.factored import Factored
from lora_jax.core.parts import AXES, NEUTRAL, RANK, Axes, pad_rank, rank_axis, shape_of_axes
from lora_jax.core.types import Outcome, Value


def _mul(_: Interpreter, use: Use) -> Outcome:
    weight, factor = sorted(use.values, key=lambda value: not isinstance(value, Factored))
    return None if isinstance(factor, Factored) else _scale_weight(use, weight, factor)


def _div(_: Interpreter, use: Use) -> Outcome:
    weight, divisor = use.values
    return None if isinstance(divisor, Factored) else _scale_weight(use, weight, 1 / divisor)


def _neg(_: Interpreter, use: Use) -> Outcome:
    (weight,) = use.values
    negated = {name: -weight.parts[name] for name in ("scale", "shift") if name in weight.parts}
    return [weight.replace(base=use.bind(use.bases)[0], **negated)]


_MATRIX_ROLES: tuple[Label, Label] = ("in", "out")
# The parts that a factor multiplies, by the role of the axes that it varies along; "batch" where it
# varies along neither in nor out axes.
_SCALED_PARTS: dict[Label, tuple[str, ...]] = {
    "in": ("a",),
    "out": ("b", "shift"),
    "batch": ("scale", "shift"),
}


def _scale_weight(use: Use, weight: Factored, factor: jax.Array) -> Outcome:
    """Scales a weight by a factor that varies along batch axes and one other role at most."""
    factor = jnp.asarray(factor)
    if not jnp.issubdtype(factor.dtype, jnp.floating):
        return None
    shape = factor.shape or (1,) * len(weight.labels)
    (base,) = use.bind(use.bases)
    if base.shape != weight.base.shape:
        axes = zip(weight.labels, weight.base.shape, base.shape, strict=True)
        is_stretched_matrix = any(
            label != "batch" and size != result_size for label, size, result_size in axes
        )
        if is_stretched_matrix:
            return None
        weight = weight.with_base_and_labels(base, weight.labels, weight.base.shape)
    varying_roles = {label for size, label in zip(shape, weight.labels, strict=True) if size != 1}
    if {"in", "out"} <= varying_roles:
        return None  # neither factor alone can take the whole array
    role: Label = "batch"
    for side in _MATRIX_ROLES:
        if side in varying_roles:
            role = side
            weight = weight.formed()
    factor = factor.reshape(shape)
    scaled_parts = {}
    for name in _SCALED_PARTS[role]:
        if name in weight.parts:
            part = weight.parts[name]
            scaled_parts[name] = part * _array_in_layout(factor, weight.layout(name), part.dtype)
    return [weight.replace(base=base, **scaled_parts)]


def _array_in_layout(array: jax.Array, layout: Axes, dtype: DTypeLike) -> jax.Array:
    """Returns an array with its axes in a part's layout; missing axes have size one."""
    weight_axes = [axis for axis in layout if axis != RANK]
    unit_axes = [axis for axis in range(array.ndim) if axis not in weight_axes]
    array = lax.transpose(array, [*weight_axes, *unit_axes])
    layout_shape = list(array.shape[: len(weight_axes)])
    if RANK in layout:
        layout_shape.insert(layout.index(RANK), 1)
    return array.reshape(layout_shape).astype(dtype)


def _add_weights(_: Interpreter, use: Use, sign: int = 1) -> Outcome:
    """Adds an array to W, or adds two weights by concatenating their factors along the rank."""
    values = use.values
    shape = eqns.type_of(use.eqn.outvars[0]).shape
    weights = _weights_among(values)
    if any(weight.base.shape != shape or has_gain_or_shift(weight) for weight in weights):
        return None  # the weight itself is stretched, or it is (W + s·AB)·diag(g)
    if sign < 0 and isinstance(values[1], Factored):
        weights[-1] = weights[-1].replace(scale=-weights[-1].scale)
    (base,) = use.bind(use.bases)
    if len(weights) == 1:
        return [weights[0].replace(base=base)]
    aligned = _align_roles(weights)
    if aligned is None:
        return None
    aligned = [move_scale_into_a(weight) for weight in aligned]
    rank_index = len(aligned[0].axes("batch"))
    factors = {}
    for name in ("a", "b"):
        arrays = [weight.parts[name] for weight in aligned]
        factors[name] = jnp.concatenate(arrays, axis=rank_index)
    return [aligned[0].replace(base=base, **factors)]


def _weights_among(values: Sequence[Value]) -> list[Factored]:
    return [value for value in values if isinstance(value, Factored)]


def _align_roles(values: Sequence[Value]) -> Outcome:
    """Returns the values with equal axis roles in all weights, or None if that fails.

    A weight that comes transposed to the others (a tied table) is mirrored.
    """
    labels = _weights_among(values)[0].labels
    aligned: list[Value] = []
    has_mirrored = False
    for value in values:
        if isinstance(value, Factored) and value.labels != labels:
            value = mirror_weight(value)
            has_mirrored = True
        aligned.append(value)
    weights = _weights_among(aligned)
    dropout = weights[0].dropout
    if any(weight.labels != labels or weight.dropout != dropout for weight in weights):
        return None
    if len(weights) > 1 and any(weight.uses != "all" for weight in weights):
        return None  # a use may see the adapter of one of them only
    if has_mirrored and any(map(has_gain_or_shift, weights)):
        return None  # a gain of columns would become one of rows
    return aligned


def has_gain_or_shift(weight: Factored) -> bool:
    """Returns True if the weight has a gain or a shift beside its factors."""
    return weight.gain is not None or weight.shift is not None


def mirror_weight(weight: Factored) -> Factored:
    """Returns the weight with in and out axes swapped: (W + s·AB)ᵀ = Wᵀ + s·BᵀAᵀ."""
    mirror: dict[Label, Label] = {"in": "out", "out": "in", "batch": "batch"}
    weight = weight.formed()
    return weight.replace(a=weight.b, b=weight.a, labels=[mirror[label] for label in weight.labels])


def move_scale_into_a(weight: Factored) -> Factored:
    """Returns the weight with s·A for A, and s = 1."""
    weight = weight.formed()
    scales = weight.scales.astype(weight.a.dtype)
    a = weight.a * lax.expand_dims(scales, range(scales.ndim, weight.a.ndim))
    return weight.replace(a=a, scale=jnp.ones_like(weight.scale), lambda_d=None)


def _concatenate(_: Interpreter, use: Use) -> Outcome:
    """Concatenates kernels along an in or out axis; each keeps its own columns of the rank."""
    return _join_along_axis(use, use.values, use.params["dimension"])


def _stack(_: Interpreter, use: Use) -> Outcome:
    """Stacks kernels along a new batch axis."""
    axis = use.params["axis"]

    def expand(value: Value) -> Value:
        if not isinstance(value, Factored):
            return jnp.expand_dims(value, axis)
        labels = (*value.labels[:axis], "batch", *value.labels[axis:])
        return value.with_base_and_labels(jnp.expand_dims(as_array(value.base), axis), labels)

    return _join_along_axis(use, [expand(value) for value in use.values], axis)


def _join_along_axis(use: Use, values: Sequence[Value], dimension: int) -> Outcome:
    """Concatenates weights, and plain arrays among them, along an axis.

    Args:
      use: the equation; its base is that of the result.
      values: operands, all of the rank of the result.
      dimension: the axis, in each of them.
    """
    values = [value.formed() if isinstance(value, Factored) else value for value in values]
    aligned = _align_roles(values)
    if aligned is None:
        return None
    weights = _weights_among(aligned)
    model = weights[0]
    role = model.labels[dimension]
    if role == "in" and any(map(has_gain_or_shift, weights)):
        return None  # each weight has a gain of its own for the same columns
    (base,) = use.bind(use.bases)
    if role == "batch":
        join_part = _join_part_end_to_end
    else:
        join_part = _join_part_side_by_side
        aligned = [
            move_scale_into_a(value) if isinstance(value, Factored) else value for value in aligned
        ]
    # In the order of the parts: that of a set would differ from process to process.
    names = dict.fromkeys(name for weight in _weights_among(aligned) for name in weight.parts)
    parts = {name: join_part(name, aligned, model, dimension) for name in names}
    split = tuple(name for weight in weights for name in weight.split)
    return [dataclasses.replace(model, base=base, parts=parts, split=split)]


def _join_part_end_to_end(
    name: str, values: Sequence[Value], model: Factored, dimension: int
) -> jax.Array:
    """Returns a part of all values concatenated along an axis, with ranks padded.

    Args:
      name: name of the part.
      values: aligned weights and plain arrays.
      model: one of the weights, which has the roles of the result.
      dimension: axis of the values.
    """
    rank = max(weight.rank for weight in _weights_among(values))
    arrays = []
    for value in values:
        if isinstance(value, Factored) and name in value.parts:
            array = pad_rank(value.parts[name], rank_axis(AXES[name], model.labels), rank)
        else:
            array = _neutral_part(name, value, values, model, rank)
        arrays.append(array)
    return jnp.concatenate(arrays, axis=model.layout(name).index(dimension))


def _neutral_part(
    name: str, value: Value, values: Sequence[Value], model: Factored, rank: int
) -> jax.Array:
    """Returns a part without effect, for a value that lacks this part."""
    parts_of_others = [
        weight.parts[name] for weight in _weights_among(values) if name in weight.parts
    ]
    shape = shape_of_axes(AXES[name], _shape_of_value(value), model.labels, rank)
    if name == "key":
        # The key of dropout: without factors nothing is dropped, so any key will do.
        any_key = parts_of_others[0].reshape(-1)[0]
        return jnp.broadcast_to(any_key, shape)
    return jnp.full(shape, NEUTRAL.get(name, 0), parts_of_others[0].dtype)


def _join_part_side_by_side(
    name: str, values: Sequence[Value], model: Factored, dimension: int
) -> jax.Array:
    """Returns a part of values concatenated along an in or out axis, s included in A.

    The factor that has this axis is padded with zeros to the size of the result. The ranks of both
    factors lie side by side. For the arguments see `_join_part_end_to_end`.
    """
    axes = model.layout(name)
    if dimension not in axes and RANK not in axes:  # the key or the scale, which is one
        return model.parts[name] if name == "key" else jnp.ones_like(model.parts[name])
    if RANK not in axes:
        return _join_part_end_to_end(name, values, model, dimension)
    joined_size = sum(_shape_of_value(value)[dimension] for value in values)
    arrays = []
    start = 0
    for value in values:
        stop = start + _shape_of_value(value)[dimension]
        if isinstance(value, Factored):
            array = value.parts[name]
            if dimension in axes:
                padding = (start, joined_size - stop)
                array = jnp.pad(array, [padding if axis == dimension else (0, 0) for axis in axes])
            arrays.append(array)
        start = stop
    return jnp.concatenate(arrays, axis=axes.index(RANK))


def _shape_of_value(value: Value) -> tuple[int, ...]:
    shape: tuple[int, ...] = (value.base if isinstance(value, Factored) else value).shape
    return shape


def _only_with_factors(rule: Rule) -> Rule:
    """Returns a rule that declines weights without factors."""

    def apply(interpreter: Interpreter, use: Use) -> Outcome:
        if all(value.parts for value in use.values if isinstance(value, Factored)):
            return rule(interpreter, use)
        return None

    return apply


_RULES: dict[str, Rule] = {
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "add": _add_weights,
    "add_any": _add_weights,
}
_RULES |= {
    "sub": functools.partial(_add_weights, sign=-1),
    "concatenate": _concatenate,
    "stack": _stack,
}
ARITHMETIC_RULES: dict[str, Rule] = {
    name: _only_with_factors(rule) for name, rule in _RULES.items()
}
