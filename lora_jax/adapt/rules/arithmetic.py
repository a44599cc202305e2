"""Rules for operations that are linear in a weight: its factors follow, nothing is formed.

They scale a weight by a number or by a vector along batch and out axes (or batch and in axes), or a
copy of it for each row of such vectors; add other arrays and weights; and join kernels end to end.
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
from lora_jax.core.parts import AXES, NEUTRAL, RANK, Axes, filled, rank_axis, sizes
from lora_jax.core.types import Outcome, Value


def _mul(_: Interpreter, use: Use) -> Outcome:
    weight, factor = sorted(use.values, key=lambda value: not isinstance(value, Factored))
    return None if isinstance(factor, Factored) else _scaled(use, weight, factor)


def _div(_: Interpreter, use: Use) -> Outcome:
    weight, divisor = use.values
    return None if isinstance(divisor, Factored) else _scaled(use, weight, 1 / divisor)


def _neg(_: Interpreter, use: Use) -> Outcome:
    (weight,) = use.values
    turned = {name: -weight.parts[name] for name in ("scale", "shift") if name in weight.parts}
    return [weight.replace(base=use.bind(use.bases)[0], **turned)]


# The parts that a factor multiplies, by the role of the axes that it varies along; "batch" where it
# varies along neither in nor out axes.
_SCALED: dict[Label, tuple[str, ...]] = {
    "in": ("a",),
    "out": ("b", "shift"),
    "batch": ("scale", "shift"),
}


def _scaled(use: Use, weight: Factored, factor: jax.Array) -> Outcome:
    """Scales a weight by a number, or by what varies along batch axes and one other role."""
    factor = jnp.asarray(factor)
    if not jnp.issubdtype(factor.dtype, jnp.floating):
        return None
    shape = factor.shape or (1,) * len(weight.labels)
    (base,) = use.bind(use.bases)
    if base.shape != weight.base.shape:
        axes = zip(weight.labels, weight.base.shape, base.shape, strict=True)
        if not all(label == "batch" or n == m for label, n, m in axes):
            return None  # the weight itself is stretched along in or out axes
        weight = weight.relabelled(base, weight.labels, weight.base.shape)
    long = {label for n, label in zip(shape, weight.labels, strict=True) if n != 1}
    if {"in", "out"} <= long:
        return None
    role: Label = "in" if "in" in long else "out" if "out" in long else "batch"
    weight = weight if role == "batch" else weight.formed()
    factor = factor.reshape(shape)
    changed = {
        name: weight.parts[name] * _laid_out(factor, weight.layout(name), weight.parts[name].dtype)
        for name in _SCALED[role]
        if name in weight.parts
    }
    return [weight.replace(base=base, **changed)]


def _laid_out(array: jax.Array, axes: Axes, dtype: DTypeLike) -> jax.Array:
    """Returns an array with the weight's axes, those not in `axes` of size one, in that layout."""
    kept = [axis for axis in axes if axis != RANK]
    others = [axis for axis in range(array.ndim) if axis not in kept]
    moved = lax.transpose(array, [*kept, *others])
    return moved.reshape([1 if axis == RANK else array.shape[axis] for axis in axes]).astype(dtype)


def _sum(_: Interpreter, use: Use, sign: int = 1) -> Outcome:
    """Adds: W + s·AB + C keeps the factors of W; those of two weights are joined along the rank."""
    values = use.values
    shape = eqns.type_of(use.eqn.outvars[0]).shape
    weights = [v for v in values if isinstance(v, Factored)]
    if any(w.base.shape != shape or has_more(w) for w in weights):
        return None  # the weight itself is stretched, or it is (W + s·AB)·diag(g)
    if sign < 0 and isinstance(values[1], Factored):
        weights[-1] = weights[-1].replace(scale=-weights[-1].scale)
    (base,) = use.bind(use.bases)
    if len(weights) == 1:
        return [weights[0].replace(base=base)]
    aligned = _aligned(weights)
    if aligned is None:
        return None
    folded = [scale_in_a(w) for w in aligned]
    rank_axis = len(folded[0].axes("batch"))
    both = {n: jnp.concatenate([w.parts[n] for w in folded], axis=rank_axis) for n in ("a", "b")}
    return [folded[0].replace(base=base, **both)]


def _aligned(values: Sequence[Value]) -> Outcome:
    """Returns the values with all weights' axes in the same roles; None where they cannot be.

    A weight that comes transposed to the others (a tied table) is read as (BᵀAᵀ)ᵀ: the names of
    its factors change, and of their axes.
    """
    first = next(v for v in values if isinstance(v, Factored))
    aligned = [
        mirrored(v) if isinstance(v, Factored) and v.labels != first.labels else v for v in values
    ]
    weights = [v for v in aligned if isinstance(v, Factored)]
    if any(w.labels != first.labels or w.dropout != first.dropout for w in weights):
        return None
    if len(weights) > 1 and any(w.uses != "all" for w in weights):
        return None  # a use may see the adapter of one of them only
    turned = any(a is not v for a, v in zip(aligned, values, strict=True))
    if turned and any(map(has_more, weights)):
        return None  # a gain of columns would become one of rows
    return aligned


def has_more(weight: Factored) -> bool:
    """Returns True if the weight has a gain or a shift beside its factors."""
    return weight.gain is not None or weight.shift is not None


def mirrored(weight: Factored) -> Factored:
    """Returns the weight with in axes for out axes: W + s·AB read as (Wᵀ + s·BᵀAᵀ)ᵀ."""
    other: dict[Label, Label] = {"in": "out", "out": "in", "batch": "batch"}
    weight = weight.formed()
    return weight.replace(a=weight.b, b=weight.a, labels=[other[label] for label in weight.labels])


def scale_in_a(weight: Factored) -> Factored:
    """Returns the weight with s·A for A, and s = 1."""
    weight = weight.formed()
    scales = weight.scales.astype(weight.a.dtype)
    a = weight.a * lax.expand_dims(scales, range(scales.ndim, weight.a.ndim))
    return weight.replace(a=a, scale=jnp.ones_like(weight.scale), lambda_d=None)


def _concatenate(_: Interpreter, use: Use) -> Outcome:
    """Joins kernels end to end: along an in or out axis, each keeps its own columns of rank."""
    return _joined(use, use.values, use.params["dimension"])


def _stack(_: Interpreter, use: Use) -> Outcome:
    """Stacks kernels under a new axis, which is a batch axis."""
    axis = use.params["axis"]

    def expand(value: Value) -> Value:
        if not isinstance(value, Factored):
            return jnp.expand_dims(value, axis)
        labels = (*value.labels[:axis], "batch", *value.labels[axis:])
        return value.relabelled(jnp.expand_dims(as_array(value.base), axis), labels)

    return _joined(use, [expand(value) for value in use.values], axis)


def _joined(use: Use, values: Sequence[Value], dimension: int) -> Outcome:
    """Joins weights, and plain arrays among them, along an axis."""
    values = [v.formed() if isinstance(v, Factored) else v for v in values]
    aligned = _aligned(values)
    if aligned is None:
        return None
    first = next(v for v in aligned if isinstance(v, Factored))
    role = first.labels[dimension]
    weights = [v for v in aligned if isinstance(v, Factored)]
    if role == "in" and any(map(has_more, weights)):
        return None  # each part has a gain of its own for the same columns
    (base,) = use.bind(use.bases)
    join = _end_to_end if role == "batch" else _side_by_side
    if role != "batch":
        aligned = [scale_in_a(v) if isinstance(v, Factored) else v for v in aligned]
    names = {name for v in aligned if isinstance(v, Factored) for name in v.parts}
    joined = {name: join(name, aligned, first, dimension) for name in names}
    split = tuple(name for weight in weights for name in weight.split)
    return [dataclasses.replace(first, base=base, parts=joined, split=split)]


def _end_to_end(name: str, values: Sequence[Value], first: Factored, dimension: int) -> jax.Array:
    """Returns a part of all values, joined along the axis; ranks are filled up to the largest."""
    axes = first.layout(name)
    rank = max(v.rank for v in values if isinstance(v, Factored))

    def part(value: Value) -> jax.Array:
        if not isinstance(value, Factored) or name not in value.parts:
            return _neutral(name, value, values, first, rank)
        return filled(value.parts[name], rank_axis(AXES[name], first.labels), rank)

    return jnp.concatenate([part(value) for value in values], axis=axes.index(dimension))


def _neutral(
    name: str, value: Value, values: Sequence[Value], first: Factored, rank: int
) -> jax.Array:
    """Returns a part that changes nothing, for a value that lacks it."""
    like = next(v.parts[name] for v in values if isinstance(v, Factored) and name in v.parts)
    shape = (value.base if isinstance(value, Factored) else value).shape
    shape = sizes(AXES[name], shape, first.labels, rank)
    if name == "key":  # any will do
        return jnp.broadcast_to(like.reshape(-1)[0], shape)
    return jnp.full(shape, NEUTRAL.get(name, 0), like.dtype)


def _side_by_side(name: str, values: Sequence[Value], first: Factored, dimension: int) -> jax.Array:
    """Returns a part of values that are joined along an in or an out axis; s is in A.

    Along that axis each weight's long factor stands at its own place, with zeros around; the other
    factor, and the ranks, lie side by side.
    """
    axes = first.layout(name)
    if dimension not in axes and RANK not in axes:
        return first.parts[name] if name == "key" else jnp.ones_like(first.parts[name])
    if RANK not in axes:
        return _end_to_end(name, values, first, dimension)
    total = sum(_size(v, dimension) for v in values)
    arrays, start = [], 0
    for value in values:
        size = _size(value, dimension)
        if isinstance(value, Factored):
            array = value.parts[name]
            if dimension in axes:
                around = (start, total - start - size)
                array = jnp.pad(array, [around if axis == dimension else (0, 0) for axis in axes])
            arrays.append(array)
        start += size
    return jnp.concatenate(arrays, axis=axes.index(RANK))


def _size(value: Value, axis: int) -> int:
    size: int = (value.base if isinstance(value, Factored) else value).shape[axis]
    return size


def _factors_only(rule: Rule) -> Rule:
    """Returns the rule for weights with factors; it declines a base alone that is no array."""

    def apply(interpreter: Interpreter, use: Use) -> Outcome:
        if all(value.parts for value in use.values if isinstance(value, Factored)):
            return rule(interpreter, use)
        return None

    return apply


_RULES: dict[str, Rule] = {"mul": _mul, "div": _div, "neg": _neg, "add": _sum, "add_any": _sum}
_RULES |= {"sub": functools.partial(_sum, sign=-1), "concatenate": _concatenate, "stack": _stack}
ARITHMETIC_RULES: dict[str, Rule] = {name: _factors_only(rule) for name, rule in _RULES.items()}
