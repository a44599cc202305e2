"""Rules for products of examples with weights that have a separate adapter for each example."""

from collections.abc import Sequence

from lora_jax.adapt.eqns import type_of
from lora_jax.adapt.per_example.indexing import INDEXING_RULES
from lora_jax.adapt.per_example.labels import ExampleAxis, ExampleKernels, ExampleLabel, MixingError
from lora_jax.adapt.per_example.primitives import Rule, labels_of_operands, shape_of_operand
from lora_jax.adapt.rules.axis_maps import axis_map
from lora_jax.adapt.rules.layout import labels_after
from lora_jax.core.extend import JaxprEqn


def _dot_general(eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """Returns the example axis of a product, in which no example axis may be contracted."""
    contract, batch = eqn.params["dimension_numbers"]
    left_free, right_free = (_free_axes(eqn, side) for side in (0, 1))
    # For each axis of the product, the axis of the operand; None where it is the other operand's.
    left_axes: list[int | None] = [*batch[0], *left_free]
    right_axes: list[int | None] = [*batch[1], *[None] * len(left_free), *right_free]
    result_labels: set[ExampleLabel] = set()
    for side, operand_axes in enumerate((left_axes, right_axes)):
        label = labels[side]
        if not isinstance(label, ExampleAxis):
            continue
        if label.axis in contract[side]:
            raise MixingError("contracts the axis of the examples")
        result_labels.add(ExampleAxis(operand_axes.index(label.axis), label.n_consecutive))
    if len(result_labels) != 1:
        raise MixingError("multiplies examples by other examples")
    return list(result_labels)


def _free_axes(eqn: JaxprEqn, side: int) -> list[int]:
    """Returns the axes of an operand of a `dot_general` that are neither contracted nor batched."""
    contract, batch = eqn.params["dimension_numbers"]
    used_axes = (*contract[side], *batch[side])
    return [axis for axis in range(len(shape_of_operand(eqn, side))) if axis not in used_axes]


def _convolution(eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """Returns the example axis of a convolution: its batch axis."""
    x_label, kernel_label = labels
    dimension_numbers = eqn.params["dimension_numbers"]
    batch_axis, result_batch_axis = dimension_numbers.lhs_spec[0], dimension_numbers.out_spec[0]
    if kernel_label is not None and not isinstance(kernel_label, ExampleKernels):
        raise MixingError("has examples in its kernel")
    if not isinstance(x_label, ExampleAxis) or x_label.axis != batch_axis:
        raise MixingError("has the examples along another axis than its batch")
    if eqn.params["batch_group_count"] != 1:
        raise MixingError("has groups of examples")
    return [ExampleAxis(result_batch_axis, x_label.n_consecutive)]


PRODUCT_RULES: dict[str, Rule] = {
    **INDEXING_RULES,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}


def _multiply_by_kernels(
    eqn: JaxprEqn, labels: Sequence[ExampleLabel], n_examples: int
) -> list[ExampleLabel]:
    """Returns the label of a product of each example with its own weight."""
    if sum(isinstance(label, ExampleKernels) for label in labels) > 1:
        raise MixingError("multiplies an adapted weight by another one")
    if not any(isinstance(label, ExampleAxis) for label in labels):
        raise MixingError(
            "multiplies an adapted weight by a value that is the same for all examples"
        )
    labels_without_kernel = [
        None if isinstance(label, ExampleKernels) else label for label in labels
    ]
    return PRODUCT_RULES[eqn.primitive.name](eqn, labels_without_kernel, n_examples)


def _look_up_in_kernels(
    eqn: JaxprEqn, labels: Sequence[ExampleLabel], n_examples: int
) -> list[ExampleLabel]:
    """Returns the label of a look-up of each example's indices in its own table."""
    table = labels[0]
    indexed_axes = eqn.params["dimension_numbers"].start_index_map
    if not isinstance(table, ExampleKernels) or [table.roles[a] for a in indexed_axes] != ["in"]:
        raise MixingError("indexes a stack of adapted weights")
    return _multiply_by_kernels(eqn, labels, n_examples)


def _move_axes_of_kernel(
    eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int
) -> list[ExampleLabel]:
    """Returns the label of a weight after a transpose, a reshape and the like."""
    weight = _only_kernel(labels)
    source_axes = axis_map(eqn)
    if source_axes is not None:
        result_shape = type_of(eqn.outvars[0]).shape
        roles = labels_after(weight.roles, shape_of_operand(eqn), source_axes, result_shape)
        if roles is not None:
            return [ExampleKernels(tuple(roles))]
    raise MixingError("mixes the in and out axes of an adapted weight")


def _label_of_kernel(eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    return [_only_kernel(labels)] * len(eqn.outvars)


def _cut_kernel(eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """Returns the label of a slice of the weight; a slice of one row would be merged."""
    weight = _only_kernel(labels)
    shape = shape_of_operand(eqn)
    in_axes = [axis for axis, role in enumerate(weight.roles) if role == "in"]
    has_rows = any(shape[axis] > 1 for axis in in_axes)
    for output in eqn.outvars:
        output_shape = type_of(output).shape
        is_row = all(output_shape[axis] == 1 for axis in in_axes)
        if has_rows and is_row:
            raise MixingError("takes a row of an adapted weight")
    return [weight] * len(eqn.outvars)


def _unstack_kernels(eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """Returns the labels of the members of a stack of weights."""
    roles = [*_only_kernel(labels).roles]
    if roles.pop(eqn.params["axis"]) != "batch":
        raise MixingError("takes rows or columns of an adapted weight apart")
    return [ExampleKernels(tuple(roles))] * len(eqn.outvars)


def _only_kernel(labels: Sequence[ExampleLabel]) -> ExampleKernels:
    """Returns the weight's label; the weight comes first, and other operands have no examples."""
    weight, *other_labels = labels
    are_others_same = all(label is None for label in other_labels)
    if not isinstance(weight, ExampleKernels) or not are_others_same:
        raise MixingError("joins an adapted weight with something else")
    return weight


_CASTS = ("convert_element_type", "copy", "copy_p", "name", "stop_gradient")
_PLACEMENTS = ("optimization_barrier", "device_put", "sharding_constraint", "reshard")
# For equations with `ExampleKernels` among their operands. Others would form the weight.
KERNEL_RULES: dict[str, Rule] = {
    "dot_general": _multiply_by_kernels,
    "conv_general_dilated": _multiply_by_kernels,
    "gather": _look_up_in_kernels,
    **dict.fromkeys(("transpose", "squeeze", "broadcast_in_dim", "reshape"), _move_axes_of_kernel),
    **dict.fromkeys(("slice", "dynamic_slice", "split"), _cut_kernel),
    "unstack": _unstack_kernels,
    **dict.fromkeys(_CASTS, _label_of_kernel),
    **dict.fromkeys(_PLACEMENTS, labels_of_operands),
}
