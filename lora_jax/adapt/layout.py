"""Rules for primitives that only re-arrange a weight: its factors follow, nothing is formed."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt.interpreter import Interpreter, Use
from lora_jax.axes import Label
from lora_jax.product import Factored


def relabelled(weight: Factored, base: Any, labels: Sequence[Label]) -> Factored:
    """The weight with a base of another shape whose axes keep the order within each role."""
    sizes: dict[Label, list[int]] = {"batch": [], "in": [], "out": []}
    for size, label in zip(base.shape, labels, strict=True):
        sizes[label].append(size)
    rank = weight.a.shape[len(weight.axes("batch"))]
    return dataclasses.replace(
        weight,
        base=base,
        a=weight.a.reshape(*sizes["batch"], rank, *sizes["in"]),
        **{
            name: array.reshape(*sizes["batch"], rank if name == "b" else 1, *sizes["out"])
            for name, array in weight.columns().items()
        },
        scale=weight.scale.reshape(sizes["batch"]),
        key=None if weight.key is None else weight.key.reshape(sizes["batch"]),
        labels=tuple(labels),
    )


def along(weight: Factored, base: Any, move: Callable[[Any, Sequence[int]], Any]) -> Factored:
    """The weight after a move of each axis on its own, done alike to the factors.

    `move(array, axes)` gets the base's axis for each axis of the array, -1 for the rank.
    """
    stack, rows, columns = (weight.axes(label) for label in ("batch", "in", "out"))
    return dataclasses.replace(
        weight,
        base=base,
        a=move(weight.a, (*stack, -1, *rows)),
        **{name: move(v, (*stack, -1, *columns)) for name, v in weight.columns().items()},
        scale=move(weight.scale, stack),
        key=None if weight.key is None else move(weight.key, stack),
    )


def _only_weight(use: Use) -> Factored | None:
    """The weight, where it is the first operand and the others are plain."""
    first, *others = use.values
    if not isinstance(first, Factored) or any(isinstance(v, Factored) for v in others):
        return None
    return first


def _transpose(_: Interpreter, use: Use) -> list[Any] | None:
    weight = _only_weight(use)
    if weight is None:
        return None
    permutation = tuple(use.params["permutation"])
    (base,) = use.bind([weight.base])

    def moved(array: Any, axes: Sequence[int]) -> Any:
        kept = [axis for axis in permutation if axis in axes]
        rank = [axes.index(-1)] if -1 in axes else []
        n_stack = axes.index(-1) if rank else len(axes)
        order = [axes.index(axis) for axis in kept]
        stack = [position for position in order if position < n_stack]
        rest = [position for position in order if position >= n_stack]
        return lax.transpose(array, [*stack, *rank, *rest])

    weight = along(weight, base, moved)
    labels = tuple(weight.labels[axis] for axis in permutation)
    return [dataclasses.replace(weight, labels=labels)]


def _squeeze(_: Interpreter, use: Use) -> list[Any] | None:
    weight = _only_weight(use)
    if weight is None:
        return None
    (base,) = use.bind([weight.base])
    gone = {axis % len(weight.labels) for axis in use.params["dimensions"]}
    return [relabelled(weight, base, [r for i, r in enumerate(weight.labels) if i not in gone])]


def _broadcast_in_dim(_: Interpreter, use: Use) -> list[Any] | None:
    """New axes, and axes of size one that are stretched, are batch axes."""
    weight = _only_weight(use)
    if weight is None:
        return None
    bases = [v.base if isinstance(v, Factored) else v for v in use.values]
    (base,) = use.bind(bases)
    source = {target: axis for axis, target in enumerate(use.params["broadcast_dimensions"])}
    labels: list[Label] = []
    narrow = []
    for target, size in enumerate(base.shape):
        axis = source.get(target)
        kept = axis is not None and weight.base.shape[axis] == size
        labels.append(weight.labels[axis] if axis is not None and kept else "batch")
        narrow.append(size if kept else 1)
    moved = relabelled(weight, jax.ShapeDtypeStruct(tuple(narrow), base.dtype), labels)
    n = len(moved.axes("batch"))
    sizes = tuple(base.shape[axis] for axis in moved.axes("batch"))

    def stretched(array: Any) -> Any:
        return jnp.broadcast_to(array, (*sizes, *array.shape[n:]))

    return [
        dataclasses.replace(
            moved,
            base=base,
            a=stretched(moved.a),
            **{name: stretched(array) for name, array in moved.columns().items()},
            scale=stretched(moved.scale),
            key=None if moved.key is None else stretched(moved.key),
        )
    ]


def _reshape(_: Interpreter, use: Use) -> list[Any] | None:
    """A reshape that merges or splits axes of one role each; others decline."""
    weight = _only_weight(use)
    if weight is None or use.params.get("dimensions") is not None:
        return None
    new_shape = use.eqn.outvars[0].aval.shape  # type: ignore[attr-defined]
    labels = reshaped_labels(weight.base.shape, weight.labels, new_shape)
    if labels is None:
        return None
    bases = [v.base if isinstance(v, Factored) else v for v in use.values]
    (base,) = use.bind(bases)
    return [relabelled(weight, base, labels)]


def reshaped_labels(
    shape: Sequence[int], labels: Sequence[Label], new_shape: Sequence[int]
) -> list[Label] | None:
    """The role of each axis after a reshape, or None where one of them would mix two roles.

    Axes of size one hold nothing; new ones are batch axes.
    """
    if 0 in shape:
        return None
    old = [(size, label) for size, label in zip(shape, labels, strict=True) if size != 1]
    result: list[Label] = ["batch"] * len(new_shape)
    targets = [axis for axis, size in enumerate(new_shape) if size != 1]
    while old:
        (covered, role), *old = old
        axis, *targets = targets
        filled = new_shape[axis]
        group = [axis]
        while covered != filled:  # take from the side that is behind
            if covered < filled:
                (size, other), *old = old
                if other != role:
                    return None
                covered *= size
            else:
                axis, *targets = targets
                filled *= new_shape[axis]
                group.append(axis)
        for axis in group:
            result[axis] = role
    return result


def _convert(_: Interpreter, use: Use) -> list[Any] | None:
    """The base alone changes dtype: the factors are cast where they are used."""
    weight = _only_weight(use)
    if weight is None or not jnp.issubdtype(use.params["new_dtype"], jnp.floating):
        return None
    (base,) = use.bind([weight.base])
    return [dataclasses.replace(weight, base=base)]


def _same(_: Interpreter, use: Use) -> list[Any] | None:
    """The base alone goes through: a name, a copy, a barrier, a placement."""
    outputs = use.bind([v.base if isinstance(v, Factored) else v for v in use.values])
    return [
        dataclasses.replace(value, base=output) if isinstance(value, Factored) else output
        for value, output in zip(use.values, outputs, strict=True)
    ]


def _stop_gradient(_: Interpreter, use: Use) -> list[Any] | None:
    (weight,) = use.values
    stop = lax.stop_gradient
    columns = {name: stop(array) for name, array in weight.columns().items()}
    return [dataclasses.replace(weight, base=stop(weight.base), a=stop(weight.a), **columns)]


def _slice(_: Interpreter, use: Use) -> list[Any] | None:
    weight = _only_weight(use)
    if weight is None:
        return None
    start, limit = use.params["start_indices"], use.params["limit_indices"]
    strides = use.params["strides"] or (1,) * len(start)
    (base,) = use.bind([weight.base])

    def cut(array: Any, axes: Sequence[int]) -> Any:
        begin = [0 if axis == -1 else start[axis] for axis in axes]
        end = [n if axis == -1 else limit[axis] for n, axis in zip(array.shape, axes, strict=True)]
        step = [1 if axis == -1 else strides[axis] for axis in axes]
        return lax.slice(array, begin, end, step)

    return [_row_or_part(weight, along(weight, base, cut))]


def _row_or_part(weight: Factored, part: Factored) -> Any:
    """A part of a weight; where that is one row, it is a look-up: W's row + s·(A's row)B."""
    before, after = (math.prod(w.sizes("in")) for w in (weight, part))
    if not after == 1 < before:
        return part
    row = part.merged()
    return row if part.shift is None else row + part.of_columns(part.shift).astype(row.dtype)


def _split(_: Interpreter, use: Use) -> list[Any] | None:
    (weight,) = use.values
    axis = use.params["axis"]
    parts, start = [], 0
    for base in use.bind([weight.base]):
        size = base.shape[axis]

        def cut(array: Any, axes: Sequence[int], start: int = start, size: int = size) -> Any:
            if axis not in axes:
                return array
            return lax.slice_in_dim(array, start, start + size, axis=list(axes).index(axis))

        parts.append(along(weight, base, cut))
        start += size
    return parts


def _gathered_over_devices(_: Interpreter, use: Use) -> list[Any] | None:
    """Inside shard_map: the parts of an axis put together again."""
    (weight,) = use.values
    axis = use.params["all_gather_dimension"]
    if not use.params["tiled"]:
        return None
    (base,) = use.bind([weight.base])
    names, groups = use.params["axis_name"], use.params["axis_index_groups"]

    def gather(array: Any, axes: Sequence[int]) -> Any:
        if axis not in axes:
            return array
        return lax.all_gather(
            array, names, axis=list(axes).index(axis), tiled=True, axis_index_groups=groups
        )

    return [along(weight, base, gather)]


def _everywhere(_: Interpreter, use: Use) -> list[Any] | None:
    """Inside shard_map: the type says that the value varies over devices; the factors' too."""
    weights = [v for v in use.values if isinstance(v, Factored)]
    if len(weights) != len(use.values):
        return None
    bases = use.bind([w.base for w in weights])
    return [
        dataclasses.replace(
            weight,
            base=base,
            **{
                name: use.bind([array])[0]
                for name, array in {
                    "a": weight.a,
                    "scale": weight.scale,
                    **weight.columns(),
                }.items()
            },
        )
        for weight, base in zip(weights, bases, strict=True)
    ]


def _dynamic_slice(_: Interpreter, use: Use) -> list[Any] | None:
    weight = _only_weight(use)
    if weight is None:
        return None
    starts, sizes = use.values[1:], use.params["slice_sizes"]
    (base,) = use.bind([weight.base, *starts])

    def cut(array: Any, axes: Sequence[int]) -> Any:
        if not axes:
            return array
        zero = jnp.zeros_like(starts[0])
        begin = [zero if axis == -1 else starts[axis] for axis in axes]
        size = [
            array.shape[place] if axis == -1 else sizes[axis] for place, axis in enumerate(axes)
        ]
        return lax.dynamic_slice(array, begin, size)

    return [_row_or_part(weight, along(weight, base, cut))]


def _rev(_: Interpreter, use: Use) -> list[Any] | None:
    weight = _only_weight(use)
    if weight is None:
        return None
    (base,) = use.bind([weight.base])
    turned = use.params["dimensions"]

    def turn(array: Any, axes: Sequence[int]) -> Any:
        return lax.rev(array, [place for place, axis in enumerate(axes) if axis in turned])

    return [along(weight, base, turn)]


def _pad(_: Interpreter, use: Use) -> list[Any] | None:
    """Where W is padded, with whatever value, its factors are padded with zeros."""
    weight = _only_weight(use)
    if weight is None or weight.key is not None or weight.gain is not None:
        return None
    (base,) = use.bind([weight.base, use.values[1]])
    widths = use.params["padding_config"]

    def pad(array: Any, axes: Sequence[int]) -> Any:
        config = [(0, 0, 0) if axis == -1 else widths[axis] for axis in axes]
        return lax.pad(array, jnp.zeros((), array.dtype), config)

    return [along(weight, base, pad)]


LAYOUT_RULES = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "convert_element_type": _convert,
    "stop_gradient": _stop_gradient,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _rev,
    "pad": _pad,
    "split": _split,
    "all_gather": _gathered_over_devices,
    "pvary": _everywhere,
    "pcast": _everywhere,
    **dict.fromkeys(
        (
            "copy",
            "copy_p",
            "name",
            "optimization_barrier",
            "reduce_precision",
            "device_put",
            "sharding_constraint",
            "reshard",
        ),
        _same,
    ),
}
