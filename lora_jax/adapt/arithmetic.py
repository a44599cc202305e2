"""Rules for what is linear in a weight: its factors follow, nothing is formed.

Scaling by a number, or by a vector along batch and out axes (or batch and in axes); sums with
other arrays and other weights; kernels joined end to end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.axes import Label
from lora_jax.product import Factored


def _mul(_: Interpreter, use: Use) -> list[Any] | None:
    left, right = use.values
    if isinstance(left, Factored) == isinstance(right, Factored):
        return None
    weight, factor = (left, right) if isinstance(left, Factored) else (right, left)
    return _scaled(use, weight, factor)


def _div(_: Interpreter, use: Use) -> list[Any] | None:
    weight, divisor = use.values
    if not isinstance(weight, Factored) or isinstance(divisor, Factored):
        return None
    return _scaled(use, weight, 1 / divisor)


def _neg(_: Interpreter, use: Use) -> list[Any] | None:
    (weight,) = use.values
    (base,) = use.bind([weight.base])
    shift = None if weight.shift is None else -weight.shift
    return [dataclasses.replace(weight, base=base, scale=-weight.scale, shift=shift)]


def _scaled(use: Use, weight: Factored, factor: Any) -> list[Any] | None:
    """A factor of one element, or one that varies along batch axes and along one other role."""
    factor = jnp.asarray(factor)
    if not jnp.issubdtype(factor.dtype, jnp.floating):
        return None
    shape = factor.shape or (1,) * len(weight.labels)
    if any(n not in (1, m) for n, m in zip(shape, weight.base.shape, strict=True)):
        return None  # the weight itself is stretched
    long = {label for n, label in zip(shape, weight.labels, strict=True) if n != 1}
    if {"in", "out"} <= long:
        return None
    (base,) = use.bind([v.base if isinstance(v, Factored) else v for v in use.values])
    factor = factor.reshape(shape)

    def along(array: Any, label: str | None) -> Any:
        """The factor in the layout of A, B or the scale, times it."""
        stack = [shape[axis] for axis in weight.axes("batch")]
        rest = [] if label is None else [1, *(shape[axis] for axis in weight.axes(label))]  # type: ignore[arg-type]
        roles = ("batch",) if label is None else ("batch", label)
        axes = [axis for role in roles for axis in weight.axes(role)]  # type: ignore[arg-type]
        others = [axis for axis in range(len(shape)) if axis not in axes]
        moved = lax.transpose(factor, [*axes, *others])
        return array * moved.reshape(*stack, *rest).astype(array.dtype)

    if "in" in long:
        return [dataclasses.replace(weight, base=base, a=along(weight.a, "in"))]
    if "out" in long:
        changed = {name: along(v, "out") for name, v in weight.columns().items() if name != "gain"}
        return [dataclasses.replace(weight, base=base, **changed)]
    changed = {"scale": along(weight.scale, None)}
    if weight.shift is not None:
        changed["shift"] = along(weight.shift, "out")
    return [dataclasses.replace(weight, base=base, **changed)]


def _add(_: Interpreter, use: Use) -> list[Any] | None:
    return _sum(use, 1)


def _sub(_: Interpreter, use: Use) -> list[Any] | None:
    return _sum(use, -1)


def _sum(use: Use, sign: int) -> list[Any] | None:
    """W + s·AB + C has the factors of W; of two weights, ranks lie side by side."""
    values = use.values
    bases = [v.base if isinstance(v, Factored) else v for v in values]
    (base,) = use.bind(bases)
    if any(isinstance(v, Factored) and v.base.shape != base.shape for v in values):
        return None  # the weight itself is stretched
    weights = [v for v in values if isinstance(v, Factored)]
    if any(map(_has_more, weights)):
        return None  # (W + s·AB)·diag(g) + C has no such form
    if sign < 0 and isinstance(values[1], Factored):
        weights[-1] = dataclasses.replace(weights[-1], scale=-weights[-1].scale)
    if len(weights) == 1:
        return [dataclasses.replace(weights[0], base=base)]
    joined = _side_by_side(weights)
    return None if joined is None else [dataclasses.replace(joined, base=base)]


def _side_by_side(weights: Sequence[Factored]) -> Factored | None:
    """The sum of weights of one shape, but for the base: [A₁ A₂] and [B₁; B₂], s in A."""
    aligned = _aligned(weights)
    if aligned is None:
        return None
    weights, first = aligned, aligned[0]
    rank_axis = len(first.axes("batch"))
    return dataclasses.replace(
        first,
        a=jnp.concatenate([_with_scale(w) for w in weights], axis=rank_axis),
        b=jnp.concatenate([w.b for w in weights], axis=rank_axis),
        scale=jnp.ones_like(first.scale),
    )


def _aligned(values: Sequence[Any]) -> list[Any] | None:
    """The values with all weights' axes in the same roles; None where they cannot be.

    A weight that comes transposed to the others (a tied table) is read as (BᵀAᵀ)ᵀ: the names of
    its factors change, and of their axes.
    """
    first = next(v for v in values if isinstance(v, Factored))
    aligned = [
        _mirrored(v) if isinstance(v, Factored) and v.labels != first.labels else v for v in values
    ]
    weights = [v for v in aligned if isinstance(v, Factored)]
    if any(w.labels != first.labels or w.dropout != first.dropout for w in weights):
        return None
    mirrored = any(a is not v for a, v in zip(aligned, values, strict=True))
    if mirrored and any(map(_has_more, weights)):
        return None  # the gain of columns that have become rows
    return aligned


def _has_more(weight: Factored) -> bool:
    """Whether the weight has a gain or a shift beside its factors."""
    return weight.gain is not None or weight.shift is not None


def _mirrored(weight: Factored) -> Factored:
    other: dict[Label, Label] = {"in": "out", "out": "in", "batch": "batch"}
    labels = tuple(other[label] for label in weight.labels)
    return dataclasses.replace(weight, a=weight.b, b=weight.a, labels=labels)


def _with_scale(weight: Factored) -> jax.Array:
    """s·A."""
    n = weight.scale.ndim
    scale = lax.expand_dims(weight.scale, range(n, weight.a.ndim)).astype(weight.a.dtype)
    return weight.a * scale


def _concatenate(_: Interpreter, use: Use) -> list[Any] | None:
    """Kernels joined end to end: along an in or out axis, each keeps its own columns of rank."""
    values = _aligned(use.values)
    if values is None:
        return None
    first = next(v for v in values if isinstance(v, Factored))
    dimension = use.params["dimension"]
    weights = [v for v in values if isinstance(v, Factored)]
    if first.labels[dimension] == "in" and any(map(_has_more, weights)):
        return None  # each part has a gain of its own for the same columns
    (base,) = use.bind([v.base if isinstance(v, Factored) else v for v in values])
    return [_joined(values, first, base, dimension)]


def _joined(values: Sequence[Any], first: Factored, base: Any, dimension: int) -> Factored:
    joined = _joined_factors(values, first, base, dimension)
    role = first.labels[dimension]
    axis = first.axes(role).index(dimension)
    axis += 0 if role == "batch" else len(first.axes("batch")) + 1
    more: dict[str, Any] = {}
    for name, neutral in (("gain", 1.0), ("shift", 0.0)):
        given = [getattr(v, name) if isinstance(v, Factored) else None for v in values]
        like = next((array for array in given if array is not None), None)
        if like is not None:
            parts = [
                _neutral(v, first, neutral, like.dtype) if array is None else array
                for v, array in zip(values, given, strict=True)
            ]
            more[name] = jnp.concatenate(parts, axis=axis)
    return dataclasses.replace(joined, **more)


def _neutral(value: Any, first: Factored, number: float, dtype: Any) -> jax.Array:
    """A gain or a shift that changes nothing, for one of the parts that are joined."""
    shape = (value.base if isinstance(value, Factored) else value).shape
    stack, columns = ([shape[axis] for axis in first.axes(role)] for role in _STACK_AND_COLUMNS)
    return jnp.full((*stack, 1, *columns), number, dtype)


_STACK_AND_COLUMNS: tuple[Label, Label] = ("batch", "out")


def _joined_factors(values: Sequence[Any], first: Factored, base: Any, dimension: int) -> Factored:
    role = first.labels[dimension]
    place = first.axes(role).index(dimension)
    rank_axis = len(first.axes("batch"))
    weights = [v for v in values if isinstance(v, Factored)]
    if role == "batch":
        rank = max(w.a.shape[rank_axis] for w in weights)
        parts = [_stacked(v, first, dimension, rank) for v in values]
        a, b, scale = (jnp.concatenate(arrays, axis=place) for arrays in zip(*parts, strict=True))
        key = first.key
        if key is not None:
            keys = [_keys(v, first) for v in values]
            key = jnp.concatenate(keys, axis=place)
        return dataclasses.replace(first, base=base, a=a, b=b, scale=scale, key=key)
    # Along the joined axis each weight's long factor stands at its own place, with zeros around;
    # the other factor, and the ranks, lie side by side.
    axis = rank_axis + 1 + place
    long, ends = [], 0
    for value in values:
        size = (value.base if isinstance(value, Factored) else value).shape[dimension]
        if isinstance(value, Factored):
            factor = _with_scale(value) if role == "in" else value.b
            widths = [(0, 0)] * factor.ndim
            widths[axis] = (ends, base.shape[dimension] - ends - size)
            long.append(jnp.pad(factor, widths))
        ends += size
    short = [w.b if role == "in" else _with_scale(w) for w in weights]
    long_factor = jnp.concatenate(long, axis=rank_axis)
    short_factor = jnp.concatenate(short, axis=rank_axis)
    a, b = (long_factor, short_factor) if role == "in" else (short_factor, long_factor)
    return dataclasses.replace(first, base=base, a=a, b=b, scale=jnp.ones_like(first.scale))


def _stacked(value: Any, first: Factored, dimension: int, rank: int) -> tuple[Any, Any, Any]:
    """(a, b, scale) of one part of a stack, its rank padded; zeros for a plain array."""
    rank_axis = len(first.axes("batch"))
    if isinstance(value, Factored):

        def padded(factor: jax.Array) -> jax.Array:
            widths = [(0, 0)] * factor.ndim
            widths[rank_axis] = (0, rank - factor.shape[rank_axis])
            return jnp.pad(factor, widths)

        return padded(value.a), padded(value.b), value.scale
    stack = [value.shape[axis] for axis in first.axes("batch")]
    a, b = (
        jnp.zeros((*stack, rank, *factor.shape[rank_axis + 1 :]), factor.dtype)
        for factor in (first.a, first.b)
    )
    return a, b, jnp.zeros(stack, first.scale.dtype)


def _keys(value: Any, first: Factored) -> Any:
    """The dropout keys of one part of a stack; any keys at all, where it has no adapter."""
    if isinstance(value, Factored):
        return value.key
    stack = [value.shape[axis] for axis in first.axes("batch")]
    return jnp.broadcast_to(first.key.reshape(-1)[0], stack)


def _stack(interpreter: Interpreter, use: Use) -> list[Any] | None:
    """Kernels under a new axis, which is a batch axis."""
    axis = use.params["axis"]
    aligned = _aligned(use.values)
    if aligned is None:
        return None
    first = next(v for v in aligned if isinstance(v, Factored))
    (base,) = use.bind([v.base if isinstance(v, Factored) else v for v in aligned])
    labels = (*first.labels[:axis], "batch", *first.labels[axis:])
    n_before = sum(label == "batch" for label in labels[:axis])

    def under(array: Any) -> Any:
        return None if array is None else jnp.expand_dims(array, n_before)

    values = [
        dataclasses.replace(
            v,
            base=jnp.expand_dims(v.base, axis),
            a=under(v.a),
            **{name: under(array) for name, array in v.columns().items()},
            scale=under(v.scale),
            key=under(v.key),
            labels=labels,
        )
        if isinstance(v, Factored)
        else jnp.expand_dims(v, axis)
        for v in aligned
    ]
    first = next(v for v in values if isinstance(v, Factored))
    return [_joined(values, first, base, axis)]


ARITHMETIC_RULES: dict[str, Rule] = {
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "concatenate": _concatenate,
    "stack": _stack,
}
