"""Maps each axis of an operand to axes of the result, for operations that only rearrange an array.

An operand's axes are the **source axes** of the result's.
"""

from collections.abc import Callable, Sequence

from lora_jax.adapt import eqns
from lora_jax.core.extend import JaxprEqn
from lora_jax.core.types import EqnParams

Shape = Sequence[int]
# For each axis of the result, its source axes: several where they are merged, none where the axis
# is new. An axis that is split is the source of each of its parts.
AxisMap = tuple[tuple[int, ...], ...]


def axis_map(eqn: JaxprEqn) -> AxisMap | None:
    """Returns the axis map of an equation's first operand, or None if it is not known."""
    if eqn.primitive.name not in _MAPS:
        return None
    map_axes = _MAPS[eqn.primitive.name]
    shape = eqns.type_of(eqn.invars[0]).shape
    result_shape = eqns.type_of(eqn.outvars[0]).shape
    return map_axes(eqn.params, shape, result_shape)


def _transpose(params: EqnParams, *_: Shape) -> AxisMap:
    return tuple((axis,) for axis in params["permutation"])


def _squeeze(params: EqnParams, shape: Shape, _: Shape) -> AxisMap:
    ndim = len(shape)
    dropped_axes = {axis % ndim for axis in params["dimensions"]}
    return tuple((axis,) for axis in range(ndim) if axis not in dropped_axes)


def _broadcast_in_dim(params: EqnParams, _: Shape, result_shape: Shape) -> AxisMap:
    source_axes: list[tuple[int, ...]] = [()] * len(result_shape)
    for source_axis, result_axis in enumerate(params["broadcast_dimensions"]):
        source_axes[result_axis] = (source_axis,)
    return tuple(source_axes)


def _stack(params: EqnParams, shape: Shape, _: Shape) -> AxisMap:
    source_axes: list[tuple[int, ...]] = [(axis,) for axis in range(len(shape))]
    source_axes.insert(params["axis"], ())
    return tuple(source_axes)


def _reshape(params: EqnParams, shape: Shape, result_shape: Shape) -> AxisMap | None:
    transposes = params.get("dimensions") is not None
    return None if transposes else regrouped(shape, result_shape)


def regrouped(shape: Shape, result_shape: Shape) -> AxisMap | None:
    """Returns the axis map of a reshape, or None for an empty array. Unit axes have no source."""
    if 0 in shape:
        return None
    remaining_source_axes = [axis for axis, size in enumerate(shape) if size != 1]
    remaining_result_axes = [axis for axis, size in enumerate(result_shape) if size != 1]
    source_axes: list[tuple[int, ...]] = [()] * len(result_shape)
    while remaining_source_axes:
        # The next group: the fewest axes of both that have the same number of elements.
        source_group = [remaining_source_axes.pop(0)]
        result_group = [remaining_result_axes.pop(0)]
        source_size = shape[source_group[0]]
        result_size = result_shape[result_group[0]]
        while source_size != result_size:
            if source_size < result_size:
                axis = remaining_source_axes.pop(0)
                source_group.append(axis)
                source_size *= shape[axis]
            else:
                axis = remaining_result_axes.pop(0)
                result_group.append(axis)
                result_size *= result_shape[axis]
        for axis in result_group:
            source_axes[axis] = tuple(source_group)
    return tuple(source_axes)


_MAPS: dict[str, Callable[[EqnParams, Shape, Shape], AxisMap | None]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "stack": _stack,
}
