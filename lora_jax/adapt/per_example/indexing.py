"""Rules for gathers and scatters: the axis of the examples in their results.

An **index axis** is an axis of the array of indices, but for the last one, which holds the
elements of an index. A **batching axis** of the operand belongs to one index axis: each
of its elements has indices of its own.
"""

from collections.abc import Sequence

from lora_jax.adapt.per_example.labels import ExampleAxis, ExampleLabel, MixingError
from lora_jax.adapt.per_example.primitives import Rule, shape_of_operand, shape_of_output
from lora_jax.core.extend import JaxprEqn

_SAME_INDEX_FOR_ALL = "finds examples by an index that is the same for none or all of them"


def _gather(eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """Returns the example axis after a gather with indices or an operand for each example."""
    operand_label, indices_label = labels
    dimension_numbers = eqn.params["dimension_numbers"]
    batching_axes = tuple(dimension_numbers.operand_batching_dims)
    result_axes = range(len(shape_of_output(eqn)))
    # For each index axis, the axis of the result that it becomes.
    result_of_index_axis = [
        axis for axis in result_axes if axis not in dimension_numbers.offset_dims
    ]
    # A table that is the same for all examples, which lie along an index axis.
    if not isinstance(operand_label, ExampleAxis):
        assert isinstance(indices_label, ExampleAxis)
        if indices_label.axis >= len(result_of_index_axis):
            raise MixingError("finds one element by indices of several examples")
        result_axis = result_of_index_axis[indices_label.axis]
        return [ExampleAxis(result_axis, indices_label.n_consecutive)]
    # Each example has indices of its own.
    n_consecutive = operand_label.n_consecutive
    if operand_label.axis in batching_axes:
        batching_index = batching_axes.index(operand_label.axis)
        index_axis = dimension_numbers.start_indices_batching_dims[batching_index]
        if indices_label not in (None, ExampleAxis(index_axis, n_consecutive)):
            raise MixingError("looks up by indices of other examples")
        return [ExampleAxis(result_of_index_axis[index_axis], n_consecutive)]
    # The indices are the same for all examples, which lie along an axis that is taken whole.
    operand_shape = shape_of_operand(eqn)
    takes_all = eqn.params["slice_sizes"][operand_label.axis] == operand_shape[operand_label.axis]
    is_indexed = operand_label.axis in dimension_numbers.start_index_map
    if indices_label is not None or is_indexed or not takes_all:
        raise MixingError(_SAME_INDEX_FOR_ALL)
    dropped_axes = (*dimension_numbers.collapsed_slice_dims, *batching_axes)
    slice_axes = [axis for axis in range(len(operand_shape)) if axis not in dropped_axes]
    if operand_label.axis not in slice_axes:  # an axis of size one
        raise MixingError("drops the axis of the examples")
    return [
        ExampleAxis(
            dimension_numbers.offset_dims[slice_axes.index(operand_label.axis)], n_consecutive
        )
    ]


def _scatter(eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """Returns the example axis after a scatter into each example's part of the operand."""
    operand_label, indices_label, updates_label = labels
    axes = _ScatterAxes(eqn)
    target = _operand_axis_of_examples(axes, operand_label, indices_label, updates_label)
    # Each example has indices of its own.
    if target.axis in axes.batching:
        index_axis = axes.index_of_batching[axes.batching.index(target.axis)]
        update_axis = axes.update_of_index[index_axis]
        if indices_label not in (None, ExampleAxis(index_axis, target.n_consecutive)):
            raise MixingError(_OTHER_EXAMPLES)
        if updates_label not in (None, ExampleAxis(update_axis, target.n_consecutive)):
            raise MixingError(_OTHER_EXAMPLES)
        return [target]
    # The indices are the same for all examples, which lie along an axis that is updated whole.
    if target.axis not in axes.window or target.axis in axes.indexed:
        raise MixingError(_SAME_INDEX_FOR_ALL)
    update_axis = axes.update_of_window[axes.window.index(target.axis)]
    updates_all = shape_of_operand(eqn, 2)[update_axis] == shape_of_operand(eqn)[target.axis]
    is_of_same_examples = updates_label in (None, ExampleAxis(update_axis, target.n_consecutive))
    if indices_label is not None or not is_of_same_examples or not updates_all:
        raise MixingError(_SAME_INDEX_FOR_ALL)
    return [target]


_OTHER_EXAMPLES = "updates by indices, or with values, of other examples"


class _ScatterAxes:
    """The axes of a scatter's operand, indices and updates.

    Attributes:
      batching: axes of the operand that have indices of their own.
      index_of_batching: the index axis of each batching axis.
      window: axes of the operand that an update covers.
      update_of_window: the axis of the updates that belongs to each window axis.
      update_of_index: the axis of the updates that belongs to each index axis.
      indexed: axes of the operand along which an index says where an update goes.
    """

    def __init__(self, eqn: JaxprEqn) -> None:
        """Reads the axes from the equation's dimension numbers."""
        dimension_numbers = eqn.params["dimension_numbers"]
        self.batching = tuple(dimension_numbers.operand_batching_dims)
        self.index_of_batching = tuple(dimension_numbers.scatter_indices_batching_dims)
        dropped_axes = (*dimension_numbers.inserted_window_dims, *self.batching)
        operand_axes = range(len(shape_of_operand(eqn)))
        self.window = [axis for axis in operand_axes if axis not in dropped_axes]
        self.update_of_window = tuple(dimension_numbers.update_window_dims)
        update_axes = range(len(shape_of_operand(eqn, 2)))
        self.update_of_index = [axis for axis in update_axes if axis not in self.update_of_window]
        self.indexed = tuple(dimension_numbers.scatter_dims_to_operand_dims)


def _operand_axis_of_examples(
    axes: _ScatterAxes,
    operand_label: ExampleLabel,
    indices_label: ExampleLabel,
    updates_label: ExampleLabel,
) -> ExampleAxis:
    """Returns the axis of the examples in a scatter's operand, from whichever operand has it."""
    if isinstance(operand_label, ExampleAxis):
        return operand_label
    if isinstance(updates_label, ExampleAxis):
        n_consecutive = updates_label.n_consecutive
        if updates_label.axis in axes.update_of_window:
            # Each update covers all examples: the axis goes to the operand with the window.
            window_index = axes.update_of_window.index(updates_label.axis)
            return ExampleAxis(axes.window[window_index], n_consecutive)
        # Each example has its own updates: the axis of the updates is one of the indices.
        index_axis = axes.update_of_index.index(updates_label.axis)
    else:
        assert isinstance(indices_label, ExampleAxis)
        n_consecutive = indices_label.n_consecutive
        index_axis = indices_label.axis
    # An axis of the indices is one of the operand only if the scatter is batched along it.
    if index_axis not in axes.index_of_batching:
        raise MixingError(_SAME_INDEX_FOR_ALL)
    operand_axis = axes.batching[axes.index_of_batching.index(index_axis)]
    return ExampleAxis(operand_axis, n_consecutive)


INDEXING_RULES: dict[str, Rule] = {"gather": _gather}
INDEXING_RULES |= dict.fromkeys(
    ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"), _scatter
)
