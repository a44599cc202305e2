"""The rule for look-ups: rows of A times B in place of rows of AB, and members of a stack."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.products import note_side, rows_of
from lora_jax.core.base import along, as_array
from lora_jax.core.factored import Factored
from lora_jax.core.parts import NEUTRAL, Axes
from lora_jax.core.product import combined
from lora_jax.core.types import BaseLike, Forward, Outcome, Parts, Value


def _gather(_: Interpreter, use: Use) -> Outcome:
    """Looks up rows of A along an in axis; along a batch axis, takes whole factors."""
    weight, indices = use.values
    if isinstance(indices, Factored):
        return None
    numbers, sizes = use.params["dimension_numbers"], tuple(use.params["slice_sizes"])
    rows = _looked_up(weight, indices, numbers, sizes, use)
    return None if rows is None else [rows]


def _indexed_axis(
    numbers: lax.GatherDimensionNumbers, sizes: tuple[int, ...], shape: tuple[int, ...]
) -> int | None:
    """Returns the one axis that a gather indexes, where it takes all others whole; else None."""
    cut = [axis for axis in numbers.start_index_map if sizes[axis] != shape[axis]]
    cut = cut or list(numbers.start_index_map)
    if len(cut) != 1:
        return None
    (axis,) = cut
    whole = tuple(1 if a == axis else n for a, n in enumerate(shape))
    return axis if sizes == whole and numbers.collapsed_slice_dims in ((), (axis,)) else None


def _looked_up(
    weight: Factored,
    indices: jax.Array,
    numbers: lax.GatherDimensionNumbers,
    sizes: tuple[int, ...],
    use: Use,
) -> Value:
    """Returns the rows, or the members of a stack; None if the look-up has no factored form.

    Where the axis is kept with size one (as vmap does for `table[i]`), it is put back at the end.
    """
    if numbers.operand_batching_dims:
        return _looked_up_by_member(weight, indices, numbers, sizes, use)
    shape = weight.base.shape
    axis = _indexed_axis(numbers, sizes, shape)
    if axis is None:
        return None
    offsets = list(numbers.offset_dims)
    if len(numbers.start_index_map) > 1:
        if use.params["mode"] is lax.GatherScatterMode.FILL_OR_DROP:
            return None  # there, an index along an axis that is taken whole can drop a row
        place = numbers.start_index_map.index(axis)
        indices = lax.slice_in_dim(indices, place, place + 1, axis=indices.ndim - 1)
    unit = None if numbers.collapsed_slice_dims else offsets.pop(axis)
    if unit is not None:
        offsets = [place - (place > unit) for place in offsets]
    look_up = functools.partial(_take, indices=indices, mode=use.params["mode"])

    fill = use.params["fill_value"]
    as_nan = fill is None or fill != fill  # a base's codes cannot be NaN, but its scales can

    def read(array: jax.Array, axes: Axes) -> jax.Array:
        given = fill if jnp.issubdtype(array.dtype, jnp.inexact) else None
        return look_up(array, axes.index(axis), offsets=offsets, fill_value=given)

    base = along(weight.base if as_nan else as_array(weight.base), read, [axis])
    if not weight.parts and len(shape) == 2:  # rows of a table
        rows = as_array(base)
        return rows if unit is None else jnp.expand_dims(rows, unit)
    if weight.labels[axis] == "batch":
        stack = _look_up_layers(weight, base, axis, indices, offsets, look_up)
        if unit is None:
            return stack
        base, labels = jnp.expand_dims(as_array(stack.base), unit), list(stack.labels)
        labels.insert(unit, "batch")
        return stack.relabelled(base, labels)
    if weight.labels[axis] != "in" or len(weight.axes("in")) != 1 or weight.axes("batch"):
        return None
    places = [a for a in range(len(offsets) + indices.ndim - 1) if a not in offsets]
    rows = _rows_of_table(weight, base, look_up, places + offsets, use)
    has_columns = weight.gain is not None or weight.shift is not None
    if has_columns and not as_nan and use.params["mode"] is lax.GatherScatterMode.FILL_OR_DROP:
        index = lax.expand_dims(indices[..., 0], offsets)
        is_inside = (index >= 0) & (index < shape[axis])
        rows = jnp.where(is_inside, rows, as_array(base))
    return rows if unit is None else jnp.expand_dims(rows, unit)


def _rows_of_table(
    weight: Factored, base: BaseLike, look_up: Forward, order: Sequence[int], use: Use
) -> Value:
    """Returns rows of W + s·AB: those of W, and s times those of A, multiplied by B.

    Args:
      weight: the table.
      base: the rows of W.
      look_up: takes an array and an axis, and returns what the indices choose.
      order: the axes of the result: first those of the indices, then those of a row.
      use: the look-up.
    """
    note_side(weight, "in", use)
    own = rows_of(weight, use)

    def rows_of_factors(_: object, weight: Factored, rows: jax.Array) -> jax.Array:
        z = look_up(weight.a, 1, fill_value=0)  # [r, …]
        scales = lax.expand_dims(weight.scales.astype(z.dtype), range(1, z.ndim))
        z = z * scales
        if own is not None:
            z = z * own.along(z, 1 + own.axis, rank=0)
        z, b = z.astype(rows.dtype), weight.b.astype(rows.dtype)
        return placed(jnp.tensordot(z, b, ((0,), (0,)), preferred_element_type=rows.dtype))

    def placed(array: jax.Array) -> jax.Array:
        """Puts columns, or places and columns, in the order of the rows."""
        array = lax.expand_dims(array, range(len(order) - array.ndim))
        return lax.transpose(array, [order.index(axis) for axis in range(array.ndim)])

    rows: Value = combined(
        None, weight.replace(key=None), lambda _: as_array(base), rows_of_factors, placed
    )
    return rows


def _looked_up_by_member(
    weight: Factored,
    indices: jax.Array,
    numbers: lax.GatherDimensionNumbers,
    sizes: tuple[int, ...],
    use: Use,
) -> jax.Array | None:
    """Returns the rows of each table of a stack at indices of its own, as under vmap; or None."""
    # Of NumPy's integers, some of which JAX writes there, `jax.vmap` takes none.
    axis, *axes = map(int, numbers.operand_batching_dims)
    place, *places = map(int, numbers.start_indices_batching_dims)
    if weight.labels[axis] != "batch" or weight.rows is not None:
        return None
    n_out = indices.ndim - 1 + len(numbers.offset_dims)
    out = [a for a in range(n_out) if a not in numbers.offset_dims][place]

    def without(gone: int, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(a - (a > gone) for a in axes)

    each = lax.GatherDimensionNumbers(
        offset_dims=without(out, numbers.offset_dims),
        collapsed_slice_dims=without(axis, numbers.collapsed_slice_dims),
        start_index_map=without(axis, numbers.start_index_map),
        operand_batching_dims=without(axis, axes),
        start_indices_batching_dims=without(place, places),
    )
    weight = weight.replace(as_array(weight.base), key=None)  # look-ups have no dropout
    at = {n: weight.layout(n).index(axis) for n in weight.parts if axis in weight.layout(n)}
    labels = weight.labels[:axis] + weight.labels[axis + 1 :]

    def one(base: jax.Array, parts: Parts, indices: jax.Array) -> jax.Array | None:
        member = dataclasses.replace(weight, base=base, parts=parts, labels=labels)
        rows = _looked_up(member, indices, each, sizes[:axis] + sizes[axis + 1 :], use)
        return None if isinstance(rows, Factored) else rows

    mapped = (axis, {name: at.get(name) for name in weight.parts}, place)
    rows: jax.Array | None = jax.vmap(one, mapped, out)(weight.base, weight.parts, indices)
    return rows


def _take(
    array: jax.Array,
    axis: int,
    *,
    indices: jax.Array,
    mode: lax.GatherScatterMode,
    offsets: Sequence[int] | None = None,
    fill_value: float | None = None,
) -> jax.Array:
    """Returns the look-up along an axis; the other axes stand at `offsets`.

    By default, the places stand where the axis stood. An index out of range gives zeros in factors:
    the base alone decides on the result there.
    """
    others = [a for a in range(array.ndim) if a != axis]
    if offsets is None:
        offsets = [a if a < axis else a + indices.ndim - 2 for a in others]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(offsets), collapsed_slice_dims=(axis,), start_index_map=(axis,)
    )
    sizes = tuple(1 if a == axis else n for a, n in enumerate(array.shape))
    return lax.gather(array, indices, numbers, sizes, mode=mode, fill_value=fill_value)


def _look_up_layers(
    weight: Factored,
    base: BaseLike,
    axis: int,
    indices: jax.Array,
    offsets: Sequence[int],
    look_up: Forward,
) -> Factored:
    """Returns the weights of some indices of a stack; the places are batch axes."""
    others = [a for a in range(len(weight.labels)) if a != axis]
    source: dict[int, Value] = dict(zip(offsets, others, strict=True))  # for each that is whole
    n_places = indices.ndim - 1
    free = [a for a in range(len(offsets) + n_places) if a not in source]
    source |= {a: ("place", i) for i, a in enumerate(free)}
    labels = [weight.labels[source[a]] if a in offsets else "batch" for a in sorted(source)]
    stack = weight.axes("batch")
    # The stacks of parts: the places first taken where the axis stood, then put in base's order.
    at = stack.index(axis)
    have = [*stack[:at], *[("place", i) for i in range(n_places)], *stack[at + 1 :]]
    order = [have.index(source[a]) for a in sorted(source) if labels[a] == "batch"]

    def taken(name: str, array: jax.Array) -> jax.Array:
        axes = weight.layout(name)
        if axis not in axes:
            return array
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jnp.take(array, indices[..., 0], axis=at, mode="clip")
        else:
            array = look_up(array, axes.index(axis), fill_value=NEUTRAL.get(name, 0))
        return lax.transpose(array, [*order, *range(len(order), array.ndim)])

    parts = {name: taken(name, array) for name, array in weight.parts.items()}
    return dataclasses.replace(weight, base=base, parts=parts, labels=tuple(labels))


LOOK_UP_RULES: dict[str, Rule] = {"gather": _gather}
