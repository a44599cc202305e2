"""Look-ups and updates by index: where the examples lie in their results."""

from collections.abc import Sequence

from lora_jax.adapt.per_example.labels import ExampleAxis, ExampleLabel, MixingError
from lora_jax.adapt.per_example.primitives import Rule, out_shape, shape_of
from lora_jax.core.extend import JaxprEqn

_BY_INDEX = "finds examples by an index that is the same for none or all of them"


def _gather(eqn: JaxprEqn, given: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """A look-up of each example's own indices, in its own part of the operand or in a table."""
    operand, indices = given
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    places = [a for a in range(len(out_shape(eqn))) if a not in numbers.offset_dims]
    batching = tuple(numbers.operand_batching_dims)
    if isinstance(operand, ExampleAxis) and operand.axis in batching:
        axis = numbers.start_indices_batching_dims[batching.index(operand.axis)]
        own = ExampleAxis(axis, operand.inner)
        if indices not in (None, own):
            raise MixingError("looks up by indices of other examples")
        return [ExampleAxis(places[axis], own.inner)]
    if isinstance(operand, ExampleAxis):
        is_whole = sizes[operand.axis] == shape_of(eqn)[operand.axis]
        if indices is not None or not is_whole or operand.axis in numbers.start_index_map:
            raise MixingError(_BY_INDEX)
        gone = (*numbers.collapsed_slice_dims, *batching)
        kept = [axis for axis in range(len(shape_of(eqn))) if axis not in gone]
        if operand.axis not in kept:  # an axis of size one
            raise MixingError("drops the axis of the examples")
        return [ExampleAxis(numbers.offset_dims[kept.index(operand.axis)], operand.inner)]
    assert isinstance(indices, ExampleAxis)
    if indices.axis >= len(places):
        raise MixingError("finds one element by indices of several examples")
    return [ExampleAxis(places[indices.axis], indices.inner)]


def _scatter(eqn: JaxprEqn, given: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """An update of each example's own part of the operand."""
    operand, indices, updates = given
    numbers = eqn.params["dimension_numbers"]
    batching = tuple(numbers.operand_batching_dims)
    by_index = tuple(numbers.scatter_indices_batching_dims)
    gone = (*numbers.inserted_window_dims, *batching)
    window = [axis for axis in range(len(shape_of(eqn))) if axis not in gone]
    in_window = tuple(numbers.update_window_dims)
    places = [axis for axis in range(len(shape_of(eqn, 2))) if axis not in in_window]

    def target() -> ExampleAxis:
        """Returns the examples' axis in the operand."""
        if isinstance(operand, ExampleAxis):
            return operand
        batched = updates if isinstance(updates, ExampleAxis) else None
        if batched is not None and batched.axis in in_window:
            return ExampleAxis(window[in_window.index(batched.axis)], batched.inner)
        if batched is None:
            batched = indices if isinstance(indices, ExampleAxis) else None
            assert batched is not None
            axis = batched.axis
        else:
            axis = places.index(batched.axis)
        if axis not in by_index:
            raise MixingError(_BY_INDEX)
        return ExampleAxis(batching[by_index.index(axis)], batched.inner)

    at = target()
    if at.axis in batching:
        axis = by_index[batching.index(at.axis)]
        own, update = ExampleAxis(axis, at.inner), ExampleAxis(places[axis], at.inner)
        if indices not in (None, own) or updates not in (None, update):
            raise MixingError("updates by indices, or with values, of other examples")
        return [at]
    if at.axis not in window or at.axis in numbers.scatter_dims_to_operand_dims:
        raise MixingError(_BY_INDEX)
    update = ExampleAxis(in_window[window.index(at.axis)], at.inner)
    is_whole = shape_of(eqn, 2)[update.axis] == shape_of(eqn)[at.axis]
    if indices is not None or updates not in (None, update) or not is_whole:
        raise MixingError(_BY_INDEX)
    return [at]


INDEXING_RULES: dict[str, Rule] = {"gather": _gather}
INDEXING_RULES |= dict.fromkeys(
    ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"), _scatter
)
