"""Rules for primitives that multiply by a weight: xW + s·(xA)B in the place of xW."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, RoleError, Rule, Use
from lora_jax.adapt.layout import relabelled
from lora_jax.axes import Label
from lora_jax.magnitude import rescaled, wide
from lora_jax.product import Factored, dot, dropped, is_dropped


def _dot_general(_: Interpreter, use: Use) -> list[Any] | None:
    left, right = use.values
    (contract, batch) = use.params["dimension_numbers"]
    if isinstance(left, Factored) and isinstance(right, Factored):
        return None
    weight_first = isinstance(left, Factored)
    x, weight = (right, left) if weight_first else (left, right)
    if weight_first:
        contract, batch = contract[::-1], batch[::-1]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    contract = (tuple(contract[0]), tuple(contract[1]))
    batch = (tuple(batch[0]), tuple(batch[1]))
    role = _contracted_role(weight, contract[1])
    if role is None:
        return None
    _check_roles(weight, contract[1], batch[1], use)
    weight = _with_unit_roles(weight, role, contract[1], batch[1])
    mirrored = set(contract[1]) != set(weight.axes("in"))
    if mirrored and not _can_be_mirrored(weight, batch[1]):
        return None
    params = {
        name: use.params[name] for name in ("precision", "preferred_element_type", "out_sharding")
    }
    params |= {"for_factors": use.for_factors(x), "weight_first": weight_first}
    return [dot(x, weight, contract=contract, batch=batch, **params)]


def _can_be_mirrored(weight: Factored, batch: Sequence[int]) -> bool:
    """Whether columns can be contracted: not beside a bias on B, nor under several gains."""
    if weight.shift is not None:
        return False
    return weight.gain is None or set(batch) == set(weight.axes("batch"))


def _contracted_role(weight: Factored, contract: Sequence[int]) -> Label | None:
    """The one role of the axes that a product contracts; None where it mixes two."""
    roles = {weight.labels[axis] for axis in contract if weight.base.shape[axis] != 1}
    if not roles:  # axes of one element alone: a layer of one input, or of one output
        return next((role for role in _ROLES if math.prod(weight.sizes(role)) == 1), None)
    return roles.pop() if len(roles) == 1 else None


_ROLES: tuple[Label, Label] = ("in", "out")


def _with_unit_roles(
    weight: Factored, role: Label, contract: Sequence[int], batch: Sequence[int]
) -> Factored:
    """The weight with the axes of size one in the roles that a product uses them in."""
    labels = list(weight.labels)
    for axis, size in enumerate(weight.base.shape):
        if size == 1 and axis in contract:
            labels[axis] = role
        elif size == 1 and (axis in batch or labels[axis] == role):
            labels[axis] = "batch"
    return weight if tuple(labels) == weight.labels else relabelled(weight, weight.base, labels)


def _check_roles(weight: Factored, contract: Sequence[int], batch: Sequence[int], use: Use) -> None:
    """A product contracts all in axes, or all out axes, and batches batch axes only."""
    shape = weight.base.shape

    def long(axes: Sequence[int]) -> set[int]:
        return {axis for axis in axes if shape[axis] != 1}

    contracted, batched = long(contract), long(batch)
    whole = contracted in (long(weight.axes("in")), long(weight.axes("out")))
    if whole and batched <= set(weight.axes("batch")):
        return
    file, line = eqns.user_line(use.eqn)
    roles = ", ".join(f"{n}: {label}" for n, label in zip(shape, weight.labels, strict=True))
    sizes = " and ".join(
        f"{verb} {[shape[axis] for axis in sorted(axes)]}"
        for verb, axes in (("contracts the axes of sizes", contracted), ("batches", batched))
        if axes
    )
    raise RoleError(
        f"the weight {weight.path!r} is recorded with the axes ({roles}), but the function "
        f"{sizes} at {file}:{line}. LoRA needs all in axes contracted, or all out axes, and batch "
        "axes left alone. Record what the function does: by hand with LoraRule(in_axes=…, "
        "out_axes=…), or by looking with lorafy(params, rules, trace=(fn, params, x))"
    )


def _conv_general_dilated(_: Interpreter, use: Use) -> list[Any] | None:
    """A convolution with A, then B at each place. In axes: space and input features."""
    x, weight = use.values
    params = use.params
    if isinstance(x, Factored) or params["batch_group_count"] != 1:
        return None
    out_axis, *in_axes = params["dimension_numbers"].rhs_spec
    _check_roles(weight, in_axes, (), use)
    weight = _with_unit_roles(weight, "in", in_axes, ())
    if weight.labels[out_axis] != "out":
        return None  # all axes but one are contracted, and that one is an in axis: a mirror image
    (product,) = use.bind([x, weight.base])
    groups = params["feature_group_count"]
    kernel = jnp.moveaxis(weight.a, 0, out_axis).astype(x.dtype)  # W's layout, r output features
    kernel = jnp.concatenate([kernel] * groups, axis=out_axis) if groups > 1 else kernel
    how = {name: params[name] for name in _CONVOLUTION if name in params}
    z = lax.conv_general_dilated(
        dropped(x, weight),
        kernel,
        **how,
        feature_group_count=groups,
        preferred_element_type=wide(x.dtype),
    )
    features = params["dimension_numbers"].out_spec[1]
    z = (jnp.moveaxis(z, features, -1) * weight.scale.astype(z.dtype)).astype(x.dtype)
    lead = z.shape[:-1]
    rank, n_out = weight.b.shape
    z = z.reshape(math.prod(lead), groups, rank)
    b = weight.b.astype(x.dtype).reshape(rank, groups, n_out // groups)
    delta = lax.dot_general(
        z,
        b,
        (((2,), (0,)), ((1,), (1,))),
        precision=params["precision"],
        preferred_element_type=product.dtype,
    )  # [groups, places, out / groups]
    delta = jnp.moveaxis(jnp.moveaxis(delta, 0, 1).reshape(*lead, n_out), -1, features)

    def along_features(vector: jax.Array) -> jax.Array:
        others = [axis for axis in range(product.ndim) if axis != features]
        return lax.expand_dims(vector.reshape(n_out), others)

    if weight.gain is None:
        result = product + delta
    elif not is_dropped(weight):
        result = rescaled(product + delta, along_features(weight.gain))
    else:
        (seen,) = use.bind([dropped(x, weight), weight.base])
        result = product - seen + rescaled(seen + delta, along_features(weight.gain))
    if weight.shift is not None:
        result += along_features(weight.shift).astype(result.dtype)
    return [result]


_CONVOLUTION = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "precision",
)


def _ragged_dot_general(_: Interpreter, use: Use) -> list[Any] | None:
    """Tokens sorted by expert: each group has its own A, B and s."""
    x, weight, sizes = use.values
    numbers = use.params["ragged_dot_dimension_numbers"]
    ((x_contract, w_contract), batch) = numbers.dot_dimension_numbers
    if (
        isinstance(x, Factored)
        or isinstance(sizes, Factored)
        or use.params["group_offset"] is not None
        or any(batch)
        or tuple(numbers.lhs_ragged_dimensions) != (0,)
        or (x.ndim, weight.base.ndim, tuple(x_contract)) != (2, 3, (1,))
        or weight.labels[numbers.rhs_group_dimensions[0]] != "batch"
    ):
        return None
    _check_roles(weight, w_contract, (), use)
    forward = weight.labels[w_contract[0]] == "in"
    if weight.shift is not None and not forward:
        return None

    def of_each_row(vector: jax.Array) -> jax.Array:
        """A gain or a shift, [groups, 1, out], for the group that each row belongs to."""
        ends = jnp.cumsum(sizes)
        group = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side="right")
        return jnp.take(lax.squeeze(vector, (1,)), group, axis=0, mode="clip")

    if weight.gain is not None and not forward:
        x = x * of_each_row(weight.gain).astype(x.dtype)
    (product,) = use.bind([x, weight.base, sizes])
    near, far = (weight.a, weight.b) if forward else (weight.b, weight.a)  # [groups, r, …] each
    scaled = (near * weight.scale[:, None, None].astype(near.dtype)).astype(x.dtype)
    how = {"precision": use.params["precision"]}
    z = lax.ragged_dot(
        dropped(x, weight),
        jnp.swapaxes(scaled, 1, 2),
        sizes,
        preferred_element_type=wide(x.dtype),
        **how,
    ).astype(x.dtype)
    delta = lax.ragged_dot(
        z, far.astype(x.dtype), sizes, preferred_element_type=product.dtype, **how
    )
    if not forward or weight.gain is None:
        result = product + delta
    elif not is_dropped(weight):
        result = rescaled(product + delta, of_each_row(weight.gain))
    else:
        (seen,) = use.bind([dropped(x, weight), weight.base, sizes])
        result = product - seen + rescaled(seen + delta, of_each_row(weight.gain))
    if weight.shift is not None:
        result += of_each_row(weight.shift).astype(result.dtype)
    return [result]


def _gather(_: Interpreter, use: Use) -> list[Any] | None:
    """A look-up along an in axis reads rows of A; along a batch axis, it takes whole factors.

    Where the axis stays, of size one (what vmap makes of `table[i]`), it comes back at the end.
    """
    weight, indices = use.values
    numbers = use.params["dimension_numbers"]
    sizes, shape = tuple(use.params["slice_sizes"]), weight.base.shape
    cut = [axis for axis in numbers.start_index_map if sizes[axis] != shape[axis]]
    cut = cut or list(numbers.start_index_map)
    if isinstance(indices, Factored) or len(cut) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = cut
    offsets = list(numbers.offset_dims)
    whole = tuple(1 if a == axis else n for a, n in enumerate(shape))
    if sizes != whole or numbers.collapsed_slice_dims not in ((), (axis,)):
        return None
    if len(numbers.start_index_map) > 1:
        if use.params["mode"] is lax.GatherScatterMode.FILL_OR_DROP:
            return None  # an index along a whole axis has a say there
        place = numbers.start_index_map.index(axis)
        indices = lax.slice_in_dim(indices, place, place + 1, axis=indices.ndim - 1)
    unit = None if numbers.collapsed_slice_dims else offsets.pop(axis)
    if unit is not None:
        offsets = [place - (place > unit) for place in offsets]
    look_up = functools.partial(
        _take, indices=indices, mode=use.params["mode"], fill_value=use.params["fill_value"]
    )
    if weight.labels[axis] == "batch":
        stack = _of_stack(weight, axis, indices, offsets, look_up)
        if unit is None:
            return [stack]
        labels = list(stack.labels)
        labels.insert(unit, "batch")
        return [relabelled(stack, jnp.expand_dims(stack.base, unit), labels)]
    if weight.labels[axis] != "in" or len(weight.axes("in")) != 1 or weight.axes("batch"):
        return None
    rows = look_up(weight.base, axis, offsets=offsets)
    z = look_up(weight.a, 1, fill_value=0)  # [r, …]
    z = (z * weight.scale.astype(z.dtype)).astype(rows.dtype)
    delta = lax.dot_general(
        z,
        weight.b.astype(rows.dtype),
        (((0,), (0,)), ((), ())),
        preferred_element_type=rows.dtype,
    )  # [places…, out…]
    places = [axis for axis in range(rows.ndim) if axis not in offsets]
    order = places + offsets

    def placed(array: jax.Array) -> jax.Array:
        return lax.transpose(array, [order.index(axis) for axis in range(rows.ndim)])

    rows += placed(delta)
    if weight.gain is not None:
        rows = rescaled(rows, placed(lax.expand_dims(weight.gain[0], range(len(places)))))
    if weight.shift is not None:
        rows += placed(lax.expand_dims(weight.shift[0], range(len(places)))).astype(rows.dtype)
    return [rows if unit is None else jnp.expand_dims(rows, unit)]


def _take(
    array: jax.Array,
    axis: int,
    *,
    indices: jax.Array,
    mode: lax.GatherScatterMode,
    offsets: Sequence[int] | None = None,
    fill_value: Any = None,
) -> jax.Array:
    """The look-up along an axis; the other axes stand at `offsets`.

    By default, the places stand where the axis stood. In factors, what lies outside is filled with
    zeros: there the base alone says what the function sees.
    """
    n_places = indices.ndim - 1
    others = [a for a in range(array.ndim) if a != axis]
    if offsets is None:
        offsets = [a if a < axis else a - 1 + n_places for a in others]
    return lax.gather(
        array,
        indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(offsets), collapsed_slice_dims=(axis,), start_index_map=(axis,)
        ),
        tuple(1 if a == axis else n for a, n in enumerate(array.shape)),
        mode=mode,
        fill_value=fill_value,
    )


def _of_stack(
    weight: Factored,
    axis: int,
    indices: jax.Array,
    offsets: Sequence[int],
    look_up: Callable[..., jax.Array],
) -> Factored:
    """The weights of some indices of a stack; the places are batch axes."""
    base = look_up(weight.base, axis, offsets=offsets)
    others = [a for a in range(len(weight.labels)) if a != axis]
    source = dict(zip(offsets, others, strict=True))  # the axis of the base for each that is whole
    labels = tuple(
        weight.labels[source[place]] if place in source else "batch" for place in range(base.ndim)
    )
    stack = weight.axes("batch")
    place = stack.index(axis)
    n_places = indices.ndim - 1
    # The factors' stacks: the places first taken where the axis stood, then put in base's order.
    have = [*stack[:place], *[("place", i) for i in range(n_places)], *stack[place + 1 :]]
    places = iter(range(n_places))
    want = [
        source[a] if a in source else ("place", next(places))
        for a in range(base.ndim)
        if labels[a] == "batch"
    ]
    order = [have.index(entry) for entry in want]

    def taken(array: Any) -> Any:
        array = look_up(array, place, fill_value=0)
        return lax.transpose(array, [*order, *range(len(order), array.ndim)])

    key = None if weight.key is None else _taken_keys(weight.key, place, indices, order)
    return dataclasses.replace(
        weight,
        base=base,
        a=taken(weight.a),
        **{name: taken(array) for name, array in weight.columns().items()},
        scale=taken(weight.scale),
        key=key,
        labels=labels,
    )


def _taken_keys(keys: jax.Array, axis: int, indices: jax.Array, order: Sequence[int]) -> jax.Array:
    """Dropout keys of some indices of a stack."""
    taken = jnp.take(keys, indices[..., 0], axis=axis, mode="clip")
    return lax.transpose(taken, tuple(order))


PRODUCT_RULES: dict[str, Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "ragged_dot_general": _ragged_dot_general,
    "gather": _gather,
}
