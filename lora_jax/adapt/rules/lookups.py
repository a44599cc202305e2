"""The rule for gathers: multiplies rows of A by B, or selects members of a stack."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.arithmetic import has_gain_or_shift
from lora_jax.adapt.rules.products import example_columns_of, record_side
from lora_jax.core.axes import Label
from lora_jax.core.base import along, as_array
from lora_jax.core.factored import Factored
from lora_jax.core.parts import NEUTRAL, Axes
from lora_jax.core.product import combine_base_and_factors
from lora_jax.core.types import BaseLike, Forward, Outcome, Parts, Value


def _gather(_: Interpreter, use: Use) -> Outcome:
    """Looks up rows of A along an in axis, or selects members along a batch axis."""
    weight, indices = use.values
    if isinstance(indices, Factored):
        return None
    dimension_numbers = use.params["dimension_numbers"]
    slice_sizes = tuple(use.params["slice_sizes"])
    result = _look_up(weight, indices, dimension_numbers, slice_sizes, use)
    return None if result is None else [result]


def _indexed_axis(
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: tuple[int, ...],
    shape: tuple[int, ...],
) -> int | None:
    """Returns the only axis that a gather indexes, or None if it slices other axes, too."""
    cut_axes = [
        axis for axis in dimension_numbers.start_index_map if slice_sizes[axis] != shape[axis]
    ]
    indexed_axes = cut_axes or list(dimension_numbers.start_index_map)
    if len(indexed_axes) != 1:
        return None
    (indexed_axis,) = indexed_axes
    shape_of_row = tuple(1 if axis == indexed_axis else size for axis, size in enumerate(shape))
    takes_rows = slice_sizes == shape_of_row
    collapses_other_axes = dimension_numbers.collapsed_slice_dims not in ((), (indexed_axis,))
    return indexed_axis if takes_rows and not collapses_other_axes else None


def _look_up(
    weight: Factored,
    indices: jax.Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: tuple[int, ...],
    use: Use,
) -> Value:
    """Returns the rows, or the members of a stack; None if the look-up has no factored form.

    Where the axis is kept with size one (as vmap does for `table[i]`), it is put back at the end.
    """
    if dimension_numbers.operand_batching_dims:
        return _look_up_by_member(weight, indices, dimension_numbers, slice_sizes, use)
    axis = _indexed_axis(dimension_numbers, slice_sizes, weight.base.shape)
    if axis is None:
        return None
    # Of axes that are taken whole.
    has_other_indices = len(dimension_numbers.start_index_map) > 1
    if has_other_indices:
        if use.params["mode"] is lax.GatherScatterMode.FILL_OR_DROP:
            return None  # there, an index along an axis that is taken whole can drop a row
        element = dimension_numbers.start_index_map.index(axis)
        indices = lax.slice_in_dim(indices, element, element + 1, axis=indices.ndim - 1)
    offsets = list(dimension_numbers.offset_dims)
    unit_axis = None
    if not dimension_numbers.collapsed_slice_dims:
        unit_axis = offsets.pop(axis)
        offsets = [offset - 1 if offset > unit_axis else offset for offset in offsets]
    result = _look_up_rows_or_members(weight, axis, indices, offsets, use)
    if unit_axis is None or result is None:
        return result
    if not isinstance(result, Factored):
        return jnp.expand_dims(result, unit_axis)
    labels = list(result.labels)
    labels.insert(unit_axis, "batch")
    return result.with_base_and_labels(jnp.expand_dims(as_array(result.base), unit_axis), labels)


def _look_up_rows_or_members(
    weight: Factored, axis: int, indices: jax.Array, offsets: Sequence[int], use: Use
) -> Value:
    """Returns the rows or members at `indices`, or None without a factored form.

    Args:
      weight: a table, or a stack of weights.
      axis: the axis of its rows, or of its members.
      indices: [places…, 1].
      offsets: for each other axis of the weight, the axis of the result.
      use: the look-up.
    """
    mode = use.params["mode"]
    fill_value = use.params["fill_value"]
    is_nan = fill_value != fill_value
    fills_with_nan = fill_value is None or is_nan
    look_up = functools.partial(_take_along_axis, indices=indices, mode=mode)

    def look_up_in_base(array: jax.Array, layout: Axes) -> jax.Array:
        is_inexact = jnp.issubdtype(array.dtype, jnp.inexact)
        array_fill = fill_value if is_inexact else None
        return look_up(array, layout.index(axis), offsets=offsets, fill_value=array_fill)

    # A base's codes cannot be NaN, but its scales can.
    stored_base = weight.base if fills_with_nan else as_array(weight.base)
    base = along(stored_base, look_up_in_base, [axis])
    if not weight.parts and len(weight.labels) == 2:  # rows of a table
        return as_array(base)
    if weight.labels[axis] == "batch":
        return _look_up_members(weight, base, axis, indices, offsets, look_up)
    if weight.labels[axis] != "in" or len(weight.axes("in")) != 1 or weight.axes("batch"):
        return None
    place_axes = [i for i in range(len(offsets) + indices.ndim - 1) if i not in offsets]
    rows = _rows_of_table(weight, base, look_up, [*place_axes, *offsets], use)
    fills_rows = not fills_with_nan and mode is lax.GatherScatterMode.FILL_OR_DROP
    if has_gain_or_shift(weight) and fills_rows:
        row_index = lax.expand_dims(indices[..., 0], offsets)
        is_inside = (row_index >= 0) & (row_index < weight.base.shape[axis])
        rows = jnp.where(is_inside, rows, as_array(base))
    return rows


def _rows_of_table(
    weight: Factored, base: BaseLike, look_up: Forward, order: Sequence[int], use: Use
) -> Value:
    """Returns rows of W + s·AB: rows of W plus s times rows of A multiplied by B.

    Args:
      weight: the table.
      base: the rows of W.
      look_up: takes an array and an axis, and returns what the indices choose.
      order: the axes of the result: first those of the indices, then those of a row.
      use: the look-up.
    """
    record_side(weight, "in", use)
    example_columns = example_columns_of(weight, use)

    def base_rows(_: object) -> jax.Array:
        return as_array(base)

    def factor_rows(_: object, weight: Factored, base_result: jax.Array) -> jax.Array:
        """Returns s times the looked-up rows of A, multiplied by B."""
        z = look_up(weight.a, 1, fill_value=0)  # [r, …]
        scales = lax.expand_dims(weight.scales.astype(z.dtype), range(1, z.ndim))
        z = z * scales
        if example_columns is not None:
            z = z * example_columns.along(z, 1 + example_columns.axis, rank=0)
        dtype = base_result.dtype
        z = z.astype(dtype)
        b = weight.b.astype(dtype)
        return arranged(jnp.tensordot(z, b, ((0,), (0,)), preferred_element_type=dtype))

    def arranged(array: jax.Array) -> jax.Array:
        """Transposes an array of columns or of rows to the axes of the result."""
        array = lax.expand_dims(array, range(len(order) - array.ndim))
        return lax.transpose(array, [order.index(axis) for axis in range(array.ndim)])

    weight = weight.replace(key=None)  # look-ups have no dropout
    return combine_base_and_factors(None, weight, base_rows, factor_rows, arranged)


def _look_up_by_member(
    weight: Factored,
    indices: jax.Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: tuple[int, ...],
    use: Use,
) -> jax.Array | None:
    """Looks up rows in each table of a stack by separate indices, as under vmap."""
    # Of NumPy's integers, some of which JAX writes there, `jax.vmap` takes none.
    stack_axis, *other_stack_axes = map(int, dimension_numbers.operand_batching_dims)
    index_axis, *other_index_axes = map(int, dimension_numbers.start_indices_batching_dims)
    if weight.labels[stack_axis] != "batch" or weight.rows is not None:
        return None
    n_result_axes = indices.ndim - 1 + len(dimension_numbers.offset_dims)
    place_axes = [
        axis for axis in range(n_result_axes) if axis not in dimension_numbers.offset_dims
    ]
    result_axis = place_axes[index_axis]
    member_numbers = lax.GatherDimensionNumbers(
        offset_dims=_axes_counted_without(result_axis, dimension_numbers.offset_dims),
        collapsed_slice_dims=_axes_counted_without(
            stack_axis, dimension_numbers.collapsed_slice_dims
        ),
        start_index_map=_axes_counted_without(stack_axis, dimension_numbers.start_index_map),
        operand_batching_dims=_axes_counted_without(stack_axis, other_stack_axes),
        start_indices_batching_dims=_axes_counted_without(index_axis, other_index_axes),
    )
    member_sizes = slice_sizes[:stack_axis] + slice_sizes[stack_axis + 1 :]
    member_labels = weight.labels[:stack_axis] + weight.labels[stack_axis + 1 :]
    weight = weight.replace(as_array(weight.base), key=None)  # look-ups have no dropout

    def look_up_in_member(base: jax.Array, parts: Parts, indices: jax.Array) -> jax.Array | None:
        member = dataclasses.replace(weight, base=base, parts=parts, labels=member_labels)
        rows = _look_up(member, indices, member_numbers, member_sizes, use)
        return None if isinstance(rows, Factored) else rows

    stack_axis_of_part: dict[str, int | None] = {}
    for name in weight.parts:
        layout = weight.layout(name)
        stack_axis_of_part[name] = layout.index(stack_axis) if stack_axis in layout else None
    look_up_in_stack = jax.vmap(
        look_up_in_member, (stack_axis, stack_axis_of_part, index_axis), result_axis
    )
    rows: jax.Array | None = look_up_in_stack(weight.base, weight.parts, indices)
    return rows


def _axes_counted_without(removed_axis: int, axes: Sequence[int]) -> tuple[int, ...]:
    """Returns the indices of axes after the removal of one axis."""
    return tuple(axis - 1 if axis > removed_axis else axis for axis in axes)


def _take_along_axis(
    array: jax.Array,
    axis: int,
    *,
    indices: jax.Array,
    mode: lax.GatherScatterMode,
    offsets: Sequence[int] | None = None,
    fill_value: float | None = None,
) -> jax.Array:
    """Returns the look-up along an axis, with the other axes at `offsets`.

    By default, the places stand where the axis stood. An index out of range gives zeros in factors:
    the base alone decides on the result there.
    """
    if offsets is None:
        n_axes_more = indices.ndim - 2
        other_axes = [i for i in range(array.ndim) if i != axis]
        offsets = [i if i < axis else i + n_axes_more for i in other_axes]
    dimension_numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(offsets), collapsed_slice_dims=(axis,), start_index_map=(axis,)
    )
    slice_sizes = list(array.shape)
    slice_sizes[axis] = 1
    return lax.gather(
        array, indices, dimension_numbers, tuple(slice_sizes), mode=mode, fill_value=fill_value
    )


def _look_up_members(
    weight: Factored,
    base: BaseLike,
    axis: int,
    indices: jax.Array,
    offsets: Sequence[int],
    look_up: Forward,
) -> Factored:
    """Returns the members of a stack at `indices`, with the index axes as batch axes.

    Args:
      weight: the stack.
      base: the bases of the result.
      axis: the axis of its members.
      indices: [places…, 1].
      offsets: for each other axis of the stack, the axis of the result.
      look_up: takes an array and an axis, and returns what the indices choose.
    """
    n_places = indices.ndim - 1
    other_axes = [i for i in range(len(weight.labels)) if i != axis]
    # Axes by name: those of the stack by number, those of the indices as strings.
    places = [f"place {i}" for i in range(n_places)]
    remaining_places = iter(places)
    axis_of_offset: dict[int, int] = dict(zip(offsets, other_axes, strict=True))
    result_axes: list[int | str] = []
    labels: list[Label] = []
    for result_axis in range(len(offsets) + n_places):
        if result_axis in axis_of_offset:
            source_axis = axis_of_offset[result_axis]
            result_axes.append(source_axis)
            labels.append(weight.labels[source_axis])
        else:
            result_axes.append(next(remaining_places))
            labels.append("batch")
    # In a part, the places first stand where the axis stood among the batch axes.
    stack_axes = weight.axes("batch")
    stack_index = stack_axes.index(axis)
    part_axes = [*stack_axes[:stack_index], *places, *stack_axes[stack_index + 1 :]]
    order = [
        part_axes.index(result_axis)
        for result_axis, label in zip(result_axes, labels, strict=True)
        if label == "batch"
    ]
    parts: Parts = {}
    for name, part in weight.parts.items():
        layout = weight.layout(name)
        if axis in layout:
            if jnp.issubdtype(part.dtype, jax.dtypes.prng_key):
                part = jnp.take(part, indices[..., 0], axis=stack_index, mode="clip")
            else:
                fill_value = NEUTRAL.get(name, 0)
                part = look_up(part, layout.index(axis), fill_value=fill_value)
            part = lax.transpose(part, [*order, *range(len(order), part.ndim)])
        parts[name] = part
    return dataclasses.replace(weight, base=base, parts=parts, labels=tuple(labels))


LOOK_UP_RULES: dict[str, Rule] = {"gather": _gather}
