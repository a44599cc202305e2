"""Rules for primitives that only rearrange a weight: its factors follow, and AB is not formed."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import FoldedVector, Interpreter, Rule, Use
from lora_jax.adapt.rules.axis_maps import AxisMap, axis_map
from lora_jax.core.axes import Label
from lora_jax.core.base import Move, along, as_array, is_base
from lora_jax.core.extend import Space, move_to_memory, varying_mesh_axes
from lora_jax.core.factored import Factored
from lora_jax.core.names import SUMMED_OVER
from lora_jax.core.parts import EXAMPLE, RANK, Axes
from lora_jax.core.types import Outcome, Value

_BLOCKS = {"batch": 0, "rank": 1, "in": 2, "out": 2}  # how the axes of each part are ordered


def _weight_among_plain_operands(use: Use) -> Factored | None:
    """Returns the first operand if it is the only weight, or None."""
    weight, *others = use.values
    has_other_weight = any(isinstance(value, Factored) for value in others)
    return weight if isinstance(weight, Factored) and not has_other_weight else None


def _rearrange(_: Interpreter, use: Use) -> Outcome:
    """Permutes, merges, splits, drops or adds axes; declines if that would mix two roles.

    A vector mixes all roles of a weight: it becomes a `FoldedVector`, which may be taken apart.
    """
    weight = _weight_among_plain_operands(use)
    source_axes_of_result = axis_map(use.eqn)
    if weight is None or source_axes_of_result is None or len(use.values) > 1:
        return None
    base = use.rearranged(weight)
    labels = labels_after(weight.labels, weight.base.shape, source_axes_of_result, base.shape)
    if labels is None:
        is_vector = len(base.shape) == 1 and bool(weight.parts)
        return [FoldedVector((weight,))] if is_vector else None
    first_result_axis: dict[int, int] = {}  # by source axis
    unbroadcast_shape: list[int] = []
    for result_axis, source_axes in enumerate(source_axes_of_result):
        for source_axis in source_axes:
            first_result_axis.setdefault(source_axis, result_axis)
        is_broadcast = all(weight.base.shape[axis] == 1 for axis in source_axes)
        unbroadcast_shape.append(1 if is_broadcast else base.shape[result_axis])

    def permute(array: jax.Array, layout: Axes) -> jax.Array:
        """Orders the axes of each role as they appear first in the result."""
        if EXAMPLE in layout:
            return array

        def position(array_axis: int) -> tuple[int, int]:
            axis = layout[array_axis]
            role = "rank" if axis == RANK else weight.labels[axis]
            return _BLOCKS[role], first_result_axis.get(axis, -1)

        return lax.transpose(array, sorted(range(len(layout)), key=position))

    permuted = weight.along(weight.base, permute)
    return [permuted.with_base_and_labels(base, labels, unbroadcast_shape)]


def labels_after(
    labels: Sequence[Label],
    shape: Sequence[int],
    source_axes_of_result: AxisMap,
    result_shape: Sequence[int],
) -> list[Label] | None:
    """Returns the role of each axis of a rearranged weight, or None if two roles are mixed.

    Axes that are new, and axes of size one that are stretched, are batch axes.
    """
    result_labels: list[Label] = []
    for source_axes, size in zip(source_axes_of_result, result_shape, strict=True):
        roles = {labels[axis] for axis in source_axes if shape[axis] != 1 or size == 1}
        if len(roles) > 1:
            return None
        result_labels.append(roles.pop() if roles else "batch")
    return result_labels


def _cast_base(_: Interpreter, use: Use) -> Outcome:
    """Casts only the base; the factors are cast where they are used."""
    weight = _weight_among_plain_operands(use)
    result_dtype = eqns.type_of(use.eqn.outvars[0]).dtype
    if weight is None or not jnp.issubdtype(result_dtype, jnp.inexact):
        return None
    if any(jnp.issubdtype(part.dtype, jnp.complexfloating) for part in weight.parts.values()):
        return None
    return [weight.replace(base=use.rearranged(weight))]


def _apply_to_base(_: Interpreter, use: Use) -> list[Value]:
    """Applies the equation only to the base: a name, a copy, a barrier, a placement."""
    if len(use.values) == 1:
        (weight,) = use.values
        return [weight.replace(base=use.rearranged(weight))]
    outputs = use.bind(use.bases)
    for index, value in enumerate(use.values):
        if isinstance(value, Factored):
            outputs[index] = value if is_base(value.base) else value.replace(base=outputs[index])
    return outputs


def _without_split_axes(weight: Factored, mesh_axes: Sequence[str]) -> Factored:
    """Returns a weight whose in axes are no longer split along these mesh axes."""
    split = tuple(name for name in weight.split if name not in mesh_axes)
    return dataclasses.replace(weight, split=split)


def _name_base(interpreter: Interpreter, use: Use) -> Outcome:
    """Applies `checkpoint_name` to the base; see `lora_jax.core.names.SUMMED_OVER`."""
    (weight,) = use.values
    name = use.params["name"]
    if not name.startswith(SUMMED_OVER):
        return _apply_to_base(interpreter, use)
    # The name is for this rule alone. On a quantized base, it would write out all of the base.
    if weight.shift is not None:
        # The devices along this axis add up their products: one of them adds the shift.
        mesh_axis = name.removeprefix(SUMMED_OVER)
        shift = jnp.where(lax.axis_index(mesh_axis) == 0, weight.shift, 0)
        weight = _without_split_axes(weight.replace(shift=shift), (mesh_axis,))
    return [weight]


def _place_base(interpreter: Interpreter, use: Use) -> list[Value]:
    """Places the base on a device; the other arrays of the weight move to the same memory."""
    outputs = _apply_to_base(interpreter, use)
    for index, output in enumerate(outputs):
        if isinstance(output, Factored):
            space = eqns.type_of(use.eqn.outvars[index]).memory_space
            outputs[index] = _moved_to_memory(output, space)
    return outputs


def _reshard(_: Interpreter, use: Use) -> list[Value]:
    """Reshards the base; the other arrays get the sharding of the axes that they share."""
    (weight,) = use.values
    sharding = use.params["dst_sharding"]
    mesh_axes_of_axis = dict(enumerate(sharding.spec))

    def reshard(array: Value, layout: Axes) -> Value:
        spec = PartitionSpec(*(mesh_axes_of_axis.get(axis) for axis in layout))
        return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))

    return [weight.along(use.rearranged(weight), reshard)]


def _moved_to_memory(weight: Factored, space: Space) -> Factored:
    """Returns a weight whose arrays other than the base are in a memory space."""

    def move(array: Value, _: Axes) -> Value:
        return move_to_memory(array, space)

    return weight.along(weight.base, move)


def _apply_to_all_arrays(_: Interpreter, use: Use) -> Outcome:
    """Applies a `pcast` or a `ppermute` inside shard_map to all arrays of a weight."""
    if not all(isinstance(value, Factored) for value in use.values):
        return None
    return [_applied_to_arrays(use, weight) for weight in use.values]


def _applied_to_arrays(use: Use, weight: Factored) -> Value:
    """Returns a weight with the equation applied to each of its arrays."""

    def apply(array: jax.Array) -> Value:
        (result,) = use.bind([_cast_to_varying(array, weight)])
        return result

    return jax.tree.map(apply, weight)


def _cast_to_varying(array: jax.Array, weight: Factored) -> jax.Array:
    """Returns an array of a weight, typed to vary over the same mesh axes as W.

    A collective takes no array that is the same on all devices, as B is if W's in axes are sharded.
    """
    mesh_axes_of_base = frozenset[str]().union(
        *map(varying_mesh_axes, jax.tree.leaves(weight.base))
    )
    missing_axes = tuple(sorted(mesh_axes_of_base - varying_mesh_axes(array)))
    return lax.pcast(array, missing_axes, to="varying") if missing_axes else array


def move_axes(weight: Factored, move: Move, touched_axes: Sequence[int] = ()) -> Factored:
    """Returns the weight after a move of axes, applied to its base and its parts."""
    return weight.along(along(weight.base, move, touched_axes), move)


_AxisSlice = tuple[int, int, int]  # start, limit, stride


def _slice_axes(weight: Factored, slice_of_axis: dict[int, _AxisSlice]) -> Factored:
    """Returns a slice of a weight, from the slice of each axis."""

    def cut(array: jax.Array, layout: Axes) -> jax.Array:
        """Slices an array of the weight along the axes that it has."""
        if not layout:
            return array
        slices = [
            slice_of_axis.get(axis, (0, size, 1))
            for axis, size in zip(layout, array.shape, strict=True)
        ]
        starts, limits, strides = zip(*slices, strict=True)
        return lax.slice(array, starts, limits, strides)

    return move_axes(weight, cut, list(slice_of_axis))


def _slice(_: Interpreter, use: Use) -> list[Value]:
    """Slices a weight with static bounds."""
    weight = use.values[0]
    starts = use.params["start_indices"]
    limits = use.params["limit_indices"]
    strides = use.params["strides"] or (1,) * len(starts)
    slice_of_axis = {
        axis: (starts[axis], limits[axis], strides[axis]) for axis in _shortened_axes(use, weight)
    }
    return [_slice_or_row(weight, _slice_axes(weight, slice_of_axis))]


def _shortened_axes(use: Use, weight: Factored) -> list[int]:
    """Returns the axes that the equation shortens."""
    result_shape = eqns.type_of(use.eqn.outvars[0]).shape
    return [axis for axis, size in enumerate(weight.base.shape) if result_shape[axis] != size]


def _slice_or_row(weight: Factored, part: Factored) -> Value:
    """Returns a slice of a weight; a single row becomes an array, as in a look-up.

    A row with a bias on B may be one of many that the function adds up: it is a look-up only where
    the weight is adapted for look-ups alone.
    """
    is_row = math.prod(part.sizes("in")) == 1 < math.prod(weight.sizes("in"))
    if not is_row or (part.shift is not None and part.uses != "lookup"):
        return part
    row = part.merged()
    if part.shift is None:
        return row
    return row + part.columns_in_base_layout(part.shift).astype(row.dtype)


def _dynamic_slice(_: Interpreter, use: Use) -> Outcome:
    """Slices a weight at traced starts."""
    weight = _weight_among_plain_operands(use)
    if weight is None:
        return None
    starts = use.values[1:]
    slice_sizes = use.params["slice_sizes"]

    def cut(array: jax.Array, layout: Axes) -> jax.Array:
        """Slices an array of the weight along the axes that it has."""
        if not layout:
            return array
        array_starts = [jnp.zeros_like(starts[0]) if axis < 0 else starts[axis] for axis in layout]
        array_sizes = [
            size if axis < 0 else slice_sizes[axis]
            for axis, size in zip(layout, array.shape, strict=True)
        ]
        return lax.dynamic_slice(array, array_starts, array_sizes)

    return [_slice_or_row(weight, move_axes(weight, cut, _shortened_axes(use, weight)))]


def _split(_: Interpreter, use: Use) -> Outcome:
    """Splits a weight along an axis into several weights."""
    (weight,) = use.values
    axis = use.params["axis"]
    ends = [0, *itertools.accumulate(use.params["sizes"])]
    return [
        _slice_axes(weight, {axis: (start, stop, 1)}) for start, stop in itertools.pairwise(ends)
    ]


def _unstack(interpreter: Interpreter, use: Use) -> Outcome:
    """Unstacks a weight along an axis, by a slice and a squeeze for each output."""
    body, _ = eqns.jaxpr_and_consts(eqns.equations_of_unstack(use.eqn))
    outputs: list[Value] = []
    for slice_eqn, squeeze_eqn in zip(body.eqns[::2], body.eqns[1::2], strict=True):
        (member,) = _slice(interpreter, dataclasses.replace(use, eqn=slice_eqn))
        squeeze = dataclasses.replace(use, eqn=squeeze_eqn, values=[member])
        is_row = not isinstance(member, Factored)
        squeezed = squeeze.bind([member]) if is_row else _rearrange(interpreter, squeeze)
        if squeezed is None:
            return None
        outputs += squeezed
    return outputs


def _all_gather(_: Interpreter, use: Use) -> Outcome:
    """Gathers the parts of an axis inside shard_map, or stacks them along a new axis."""
    (weight,) = use.values
    gathered_axis = use.params["all_gather_dimension"]
    mesh_axes = use.params["axis_name"]
    device_groups = use.params["axis_index_groups"]
    is_joined = use.params["tiled"]

    def gather(array: jax.Array, array_axis: int) -> jax.Array:
        gathered: jax.Array = lax.all_gather(
            array, mesh_axes, axis=array_axis, axis_index_groups=device_groups, tiled=is_joined
        )
        return gathered

    def join(array: jax.Array, layout: Axes) -> jax.Array:
        return gather(array, layout.index(gathered_axis)) if gathered_axis in layout else array

    if is_joined:
        if weight.labels[gathered_axis] == "in" and device_groups is None:
            weight = _without_split_axes(weight, mesh_axes)
        return [move_axes(weight, join, [gathered_axis])]

    labels: list[Label] = [*weight.labels]
    labels.insert(gathered_axis, "batch")
    stack_index = labels[:gathered_axis].count("batch")  # of the new axis among the batch axes

    def stack(array: jax.Array, _: Axes) -> jax.Array:
        return gather(_cast_to_varying(array, weight), stack_index)

    base = gather(as_array(weight.base), gathered_axis)
    return [weight.formed().along(base, stack).replace(labels=labels)]


def _rev(_: Interpreter, use: Use) -> Outcome:
    """Reverses axes of a weight, in the base and in the factors."""
    reversed_axes = use.params["dimensions"]

    def reverse(array: jax.Array, layout: Axes) -> jax.Array:
        return lax.rev(array, [i for i, axis in enumerate(layout) if axis in reversed_axes])

    return [move_axes(use.values[0], reverse, reversed_axes)]


def _pad(_: Interpreter, use: Use) -> Outcome:
    """Pads W as the equation says, and the factors with zeros."""
    weight = _weight_among_plain_operands(use)
    if weight is None or weight.key is not None or weight.gain is not None:
        return None
    (base,) = use.bind(use.bases)
    padding_of_axis = use.params["padding_config"]

    def pad(array: jax.Array, layout: Axes) -> jax.Array:
        padding = [(0, 0, 0) if axis < 0 else padding_of_axis[axis] for axis in layout]
        return lax.pad(array, jnp.zeros((), array.dtype), padding)

    return [weight.along(base, pad)]


def _stop_gradient(_: Interpreter, use: Use) -> Outcome:
    return [jax.tree.map(lax.stop_gradient, use.values[0])]


LAYOUT_RULES: dict[str, Rule] = {
    **dict.fromkeys(("transpose", "squeeze", "broadcast_in_dim", "reshape"), _rearrange),
    **dict.fromkeys(("convert_element_type", "real"), _cast_base),
    "stop_gradient": _stop_gradient,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _rev,
    "pad": _pad,
    "split": _split,
    "unstack": _unstack,
    "all_gather": _all_gather,
    "pvary": _apply_to_all_arrays,
    "pcast": _apply_to_all_arrays,
    "ppermute": _apply_to_all_arrays,
    "name": _name_base,
    **dict.fromkeys(("copy", "copy_p", "optimization_barrier", "reduce_precision"), _apply_to_base),
    "device_put": _place_base,
    "sharding_constraint": _apply_to_base,
    "reshard": _reshard,
}
