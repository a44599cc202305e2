"""Rules for primitives that only re-arrange a weight: its factors follow, nothing is formed."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import FoldedVector, Interpreter, Rule, Use
from lora_jax.adapt.rules.axis_maps import AxisMap, axis_map
from lora_jax.core.axes import Label
from lora_jax.core.base import Move, along, as_array, is_base
from lora_jax.core.extend import Space, move_to_memory, varies_over
from lora_jax.core.factored import Factored
from lora_jax.core.names import SUMMED_OVER
from lora_jax.core.parts import EXAMPLE, RANK, Axes
from lora_jax.core.types import Outcome, Value

_BLOCKS = {"batch": 0, "rank": 1, "in": 2, "out": 2}  # how the axes of each part are ordered


def _only_weight(use: Use) -> Factored | None:
    """Returns the weight, where it is the first operand and the others are plain."""
    first, *others = use.values
    if not isinstance(first, Factored) or any(isinstance(v, Factored) for v in others):
        return None
    return first


def _rearrange(_: Interpreter, use: Use) -> Outcome:
    """Permutes, merges, splits, drops or adds axes; declines where one would mix two roles.

    A vector mixes all roles of a weight: it becomes a `FoldedVector`, which may be taken apart.
    """
    weight, places = _only_weight(use), axis_map(use.eqn)
    if weight is None or places is None or len(use.values) > 1:
        return None
    base = use.rearranged(weight)
    labels = labels_after(weight.labels, weight.base.shape, places, base.shape)
    if labels is None:
        return [FoldedVector((weight,))] if len(base.shape) == 1 and weight.parts else None
    first = {axis: i for i, held in reversed(list(enumerate(places))) for axis in held}

    def permuted(array: jax.Array, axes: Axes) -> jax.Array:
        """Orders the axes of each role as they come first."""
        if EXAMPLE in axes:
            return array
        roles = ["rank" if axis == RANK else weight.labels[axis] for axis in axes]
        key = lambda i: (_BLOCKS[roles[i]], first.get(axes[i], -1))  # noqa: E731
        return lax.transpose(array, sorted(range(len(axes)), key=key))

    narrow = [
        size if any(weight.base.shape[axis] != 1 for axis in held) else 1
        for size, held in zip(base.shape, places, strict=True)
    ]
    return [weight.along(weight.base, permuted).relabelled(base, labels, narrow)]


def labels_after(
    labels: Sequence[Label], shape: Sequence[int], places: AxisMap, out: Sequence[int]
) -> list[Label] | None:
    """Returns the role of each axis of what a weight becomes, None where one would mix two roles.

    Axes that are new, and axes of size one that are stretched, are batch axes.
    """
    result: list[Label] = []
    for held, size in zip(places, out, strict=True):
        roles = {labels[axis] for axis in held if shape[axis] != 1 or size == 1}
        if len(roles) > 1:
            return None
        result.append(roles.pop() if roles else "batch")
    return result


def _convert(_: Interpreter, use: Use) -> Outcome:
    """Casts the base alone: the factors, which are real, are cast where they are used."""
    weight, out = _only_weight(use), eqns.type_of(use.eqn.outvars[0])
    if weight is None or not jnp.issubdtype(out.dtype, jnp.inexact):
        return None
    if any(jnp.issubdtype(part.dtype, jnp.complexfloating) for part in weight.parts.values()):
        return None
    return [weight.replace(base=use.rearranged(weight))]


def _same(_: Interpreter, use: Use) -> list[Value]:
    """Applies the equation to the base alone: a name, a copy, a barrier, a placement."""
    if len(use.values) == 1:
        return [use.values[0].replace(base=use.rearranged(use.values[0]))]
    outputs = use.bind(use.bases)
    return [
        (value if is_base(value.base) else value.replace(base=output))
        if isinstance(value, Factored)
        else output
        for value, output in zip(use.values, outputs, strict=True)
    ]


def _joined_over(weight: Factored, axes: Sequence[str]) -> Factored:
    """Returns a weight whose in axes are no longer split along these axes of the mesh."""
    split = tuple(name for name in weight.split if name not in axes)
    return dataclasses.replace(weight, split=split)


def _name(interpreter: Interpreter, use: Use) -> Outcome:
    """Names the base; see `lora_jax.core.names.SUMMED_OVER`."""
    (weight,), name = use.values, use.params["name"]
    axis = name.removeprefix(SUMMED_OVER)
    if weight.shift is not None and axis != name:
        shift = jnp.where(lax.axis_index(axis) == 0, weight.shift, 0)
        weight = _joined_over(weight.replace(shift=shift), (axis,))
    return _same(interpreter, dataclasses.replace(use, values=[weight]))


def _placed(interpreter: Interpreter, use: Use) -> list[Value]:
    """Places the base; the other arrays of a weight follow it to its memory."""

    def follow(value: Value, space: Space) -> Value:
        if not isinstance(value, Factored):
            return value
        return value.along(value.base, lambda array, _: move_to_memory(array, space))

    spaces = [eqns.type_of(atom).memory_space for atom in use.eqn.outvars]
    return [follow(*pair) for pair in zip(_same(interpreter, use), spaces, strict=True)]


def _everywhere(_: Interpreter, use: Use) -> Outcome:
    """Applies a `pcast` or a `ppermute` inside shard_map to each of the weight's arrays."""
    if not all(isinstance(value, Factored) for value in use.values):
        return None

    def each(weight: Factored) -> Factored:
        moved: Factored = jax.tree.map(lambda array: use.bind([_varying(array, weight)])[0], weight)
        return moved

    return [each(weight) for weight in use.values]


def _varying(array: jax.Array, weight: Factored) -> jax.Array:
    """Returns an array of a weight, inside shard_map: typed to vary over the devices that W does.

    A collective takes no array that is the same on all devices, as B is if W's in axes are sharded.
    """
    of_weight = frozenset[str]().union(*map(varies_over, jax.tree.leaves(weight.base)))
    missing = tuple(sorted(of_weight - varies_over(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def moved(weight: Factored, move: Move, touched: Sequence[int] = ()) -> Factored:
    """Returns the weight after a move of single axes, alike in its base and its parts."""
    return weight.along(along(weight.base, move, touched), move)


def _part(weight: Factored, slices: dict[int, tuple[int, int, int]]) -> Factored:
    """Returns a part of a weight, by (start, limit, stride) of the axes that are cut."""

    def cut(array: jax.Array, axes: Axes) -> jax.Array:
        three = [slices.get(axis, (0, n, 1)) for axis, n in zip(axes, array.shape, strict=True)]
        return lax.slice(array, *zip(*three, strict=True)) if three else array

    return moved(weight, cut, list(slices))


def _slice(_: Interpreter, use: Use) -> Outcome:
    weight, start = use.values[0], use.params["start_indices"]
    strides = use.params["strides"] or (1,) * len(start)
    three = list(zip(start, use.params["limit_indices"], strides, strict=True))
    part = _part(weight, {axis: three[axis] for axis in _cut_axes(use, weight)})
    return [_row_or_part(weight, part)]


def _cut_axes(use: Use, weight: Factored) -> list[int]:
    """Returns the axes that the equation makes shorter."""
    out = eqns.type_of(use.eqn.outvars[0]).shape
    return [axis for axis, n in enumerate(weight.base.shape) if out[axis] != n]


def _row_or_part(weight: Factored, part: Factored) -> Value:
    """Returns a part of a weight; one row of it as a look-up: W's row + s·(A's row)B.

    A row with a bias on B may be one of many that the function adds up: it is a look-up only where
    the weight is adapted for look-ups alone.
    """
    before, after = (math.prod(w.sizes("in")) for w in (weight, part))
    is_row = after == 1 < before
    if not is_row or (part.shift is not None and part.uses != "lookup"):
        return part
    row = part.merged()
    return row if part.shift is None else row + part.spread_columns(part.shift).astype(row.dtype)


def _dynamic_slice(_: Interpreter, use: Use) -> Outcome:
    weight = _only_weight(use)
    if weight is None:
        return None
    starts, sizes = use.values[1:], use.params["slice_sizes"]

    def cut(array: jax.Array, axes: Axes) -> jax.Array:
        if not axes:
            return array
        begin = [jnp.zeros_like(starts[0]) if axis < 0 else starts[axis] for axis in axes]
        size = [array.shape[i] if a < 0 else sizes[a] for i, a in enumerate(axes)]
        return lax.dynamic_slice(array, begin, size)

    return [_row_or_part(weight, moved(weight, cut, _cut_axes(use, weight)))]


def _split(_: Interpreter, use: Use) -> Outcome:
    axis, ends = use.params["axis"], [0, *itertools.accumulate(use.params["sizes"])]
    return [_part(use.values[0], {axis: (*pair, 1)}) for pair in itertools.pairwise(ends)]


def _gathered_over_devices(_: Interpreter, use: Use) -> Outcome:
    """Puts the parts of an axis together inside shard_map, or stacks them under a new axis."""
    (weight,) = use.values
    dimension, params = use.params["all_gather_dimension"], use.params

    def gather(array: jax.Array, axis: int) -> jax.Array:
        names, groups = params["axis_name"], params["axis_index_groups"]
        how = {"axis_index_groups": groups, "tiled": params["tiled"]}
        gathered: jax.Array = lax.all_gather(array, names, axis=axis, **how)
        return gathered

    def together(array: jax.Array, axes: Axes) -> jax.Array:
        return gather(array, axis=axes.index(dimension)) if dimension in axes else array

    if params["tiled"]:
        if weight.labels[dimension] == "in" and params["axis_index_groups"] is None:
            weight = _joined_over(weight, params["axis_name"])
        return [moved(weight, together, [dimension])]
    labels: list[Label] = [*weight.labels]
    labels.insert(dimension, "batch")
    at = labels[:dimension].count("batch")
    base = gather(as_array(weight.base), axis=dimension)
    stacked = weight.formed().along(base, lambda array, _: gather(_varying(array, weight), axis=at))
    return [stacked.replace(labels=labels)]


def _rev(_: Interpreter, use: Use) -> Outcome:
    turned = use.params["dimensions"]

    def turn(array: jax.Array, axes: Axes) -> jax.Array:
        return lax.rev(array, [place for place, axis in enumerate(axes) if axis in turned])

    return [moved(use.values[0], turn, turned)]


def _pad(_: Interpreter, use: Use) -> Outcome:
    """Factors are padded with zeros, whatever W is padded with."""
    weight = _only_weight(use)
    if weight is None or weight.key is not None or weight.gain is not None:
        return None
    (base,) = use.bind(use.bases)
    widths = use.params["padding_config"]

    def pad(array: jax.Array, axes: Axes) -> jax.Array:
        config = [(0, 0, 0) if axis < 0 else widths[axis] for axis in axes]
        return lax.pad(array, jnp.zeros((), array.dtype), config)

    return [weight.along(base, pad)]


LAYOUT_RULES: dict[str, Rule] = {
    **dict.fromkeys(("transpose", "squeeze", "broadcast_in_dim", "reshape"), _rearrange),
    **dict.fromkeys(("convert_element_type", "real"), _convert),
    "stop_gradient": lambda _, use: [jax.tree.map(lax.stop_gradient, use.values[0])],
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _rev,
    "pad": _pad,
    "split": _split,
    "all_gather": _gathered_over_devices,
    "pvary": _everywhere,
    "pcast": _everywhere,
    "ppermute": _everywhere,
    "name": _name,
    **dict.fromkeys(("copy", "copy_p", "optimization_barrier", "reduce_precision"), _same),
    "device_put": _placed,
    **dict.fromkeys(("sharding_constraint", "reshard"), _same),
}
