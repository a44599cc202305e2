"""Maps of axes: the operations that only re-arrange an array, and where each axis goes."""

from collections.abc import Callable, Sequence

from lora_jax.adapt import eqns
from lora_jax.core.extend import JaxprEqn
from lora_jax.core.types import EqnParams

Shape = Sequence[int]
# For each axis of the result, the axes of the operand that it holds: several where they are merged,
# none where the axis is new. An axis that is split is held by each of its parts.
AxisMap = tuple[tuple[int, ...], ...]


def axis_map(eqn: JaxprEqn) -> AxisMap | None:
    """Returns the map of the axes of an equation's first operand; None where it is not known."""
    if eqn.primitive.name not in _MAPS:
        return None
    shape, out = (eqns.type_of(atom).shape for atom in (eqn.invars[0], eqn.outvars[0]))
    return _MAPS[eqn.primitive.name](eqn.params, shape, out)


def _transpose(params: EqnParams, *_: Shape) -> AxisMap:
    return tuple((axis,) for axis in params["permutation"])


def _squeeze(params: EqnParams, shape: Shape, _: Shape) -> AxisMap:
    gone = {axis % len(shape) for axis in params["dimensions"]}
    return tuple((axis,) for axis in range(len(shape)) if axis not in gone)


def _broadcast_in_dim(params: EqnParams, _: Shape, out: Shape) -> AxisMap:
    source = {target: (axis,) for axis, target in enumerate(params["broadcast_dimensions"])}
    return tuple(source.get(axis, ()) for axis in range(len(out)))


def _stack(params: EqnParams, shape: Shape, _: Shape) -> AxisMap:
    at, kept = params["axis"], [(axis,) for axis in range(len(shape))]
    return (*kept[:at], (), *kept[at:])


def _reshape(params: EqnParams, shape: Shape, out: Shape) -> AxisMap | None:
    return None if params.get("dimensions") is not None else regrouped(shape, out)


def regrouped(shape: Shape, out: Shape) -> AxisMap | None:
    """Returns the map of a reshape. Axes of size one hold nothing; None for an empty array."""
    if 0 in shape:
        return None
    old = [axis for axis, size in enumerate(shape) if size != 1]
    targets = [axis for axis, size in enumerate(out) if size != 1]
    result: list[tuple[int, ...]] = [()] * len(out)
    while old:
        held, group = [old.pop(0)], [targets.pop(0)]
        covered, filled = shape[held[0]], out[group[0]]
        while covered != filled:  # take from the side that is behind
            if covered < filled:
                held.append(old.pop(0))
                covered *= shape[held[-1]]
            else:
                group.append(targets.pop(0))
                filled *= out[group[-1]]
        for axis in group:
            result[axis] = tuple(held)
    return tuple(result)


_MAPS: dict[str, Callable[[EqnParams, Shape, Shape], AxisMap | None]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "stack": _stack,
}
