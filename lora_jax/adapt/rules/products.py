"""Rules for primitives that multiply by a weight: xW + s·(xA)B in place of xW.

Weights that multiply the very same x (q, k and v; gate and up) have one product xA.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt import eqns, sides
from lora_jax.adapt.interpreter import Interpreter, RoleError, Rule, Use
from lora_jax.adapt.merging import MergeError
from lora_jax.adapt.per_example.labels import ExampleAxis
from lora_jax.adapt.per_example.tokens import wrong_order
from lora_jax.adapt.user_code import place_of
from lora_jax.core.axes import Label
from lora_jax.core.base import product
from lora_jax.core.extend import varies_over
from lora_jax.core.factored import Factored, TokensError
from lora_jax.core.few_rows import BaseDot, Dims, base_dot
from lora_jax.core.magnitude import wide
from lora_jax.core.names import FACTORS
from lora_jax.core.product import (
    ExampleColumns,
    ProductCall,
    combined,
    dot,
    is_dropped,
    is_sharded,
    scaled_product,
)
from lora_jax.core.types import Outcome, Value


def shared_product(
    use: Use, side: int, x: jax.Array, weight: Factored, contract: Dims
) -> jax.Array | None:
    """Returns s·xA of a weight, cut out of one product for all weights that x meets in a jaxpr.

    That product reads x once, and so does its derivative, which sums the cotangents of x as well.
    But the A's are copied for it: it pays where x has many rows.

    Args:
      use: the product of x and the weight.
      side: side of x.
      x: the activation as A is to read it.
      weight: the weight.
      contract: axes of x and of the weight.

    Returns:
      s·xA, see `scaled_product`; None where the weight has to have a product of its own.
    """
    products = use.inputs.products
    if id(use.eqn) in products:
        return products.pop(id(use.eqn))
    form = _form(weight, contract[1])
    if form is None or is_sharded(x):
        return None
    group = {id(use.eqn): weight}
    for eqn, place in use.inputs.others(use.eqn, side):
        other = use.inputs.ahead(eqn.invars[1 - place])
        if isinstance(other, Factored):
            other = other.seen_by("product")
        if eqn.params["precision"] != use.params["precision"] or not isinstance(other, Factored):
            continue
        if _form(other, eqn.params["dimension_numbers"][0][1 - place]) == form:
            group[id(eqn)] = other
    ranks = [each.rank for each in group.values()]
    how = ProductCall(contract, params={"precision": use.params["precision"]})
    rows = math.prod(x.shape[axis] for axis in how.x_free(x))
    if (len(ranks) - 1) * rows <= 2 * sum(ranks):  # rows not read again; rows written and read
        return None
    with jax.named_scope(FACTORS):
        a = jnp.concatenate([each.a.astype(x.dtype) for each in group.values()])
        scales = [jnp.broadcast_to(each.scales, (each.rank,)) for each in group.values()]
        ones = jnp.ones((), scales[0].dtype)
        joint = weight.replace(a=a, scale=ones, lambda_d=jnp.concatenate(scales))
        z = scaled_product(x, joint, how, n_weights=len(ranks))
        products.update(zip(group, lax.split(z, ranks, axis=z.ndim - 1), strict=True))
    return products.pop(id(use.eqn))


def _form(weight: Factored, contract: Sequence[int]) -> Hashable | None:
    """Returns a key that is equal for weights that can share a product; None where one cannot.

    It cannot where x is dropped out for it, where examples have adapters of their own, where A
    belongs to a stack or follows from other arrays, and in the mirror image.
    """
    if not weight.parts or weight.is_compact or is_dropped(weight) or weight.rows is not None:
        return None
    ins, a = weight.axes("in"), weight.parts["a"]
    if weight.axes("batch") or set(contract) != set(ins) or is_sharded(a):
        return None
    if not jnp.issubdtype(weight.base.dtype, jnp.floating):
        return None
    order = tuple(ins.index(axis) for axis in contract)
    return order, weight.sizes("in"), varies_over(a)


def base_product(use: Use, place: int) -> Callable[[Value], jax.Array]:
    """Returns a function of x: the equation with W at a place, and x at the first other one."""

    def apply(x: jax.Array) -> jax.Array:
        others = [v for i, v in enumerate(use.values) if i != place]
        others[0] = x

        def bind(w: jax.Array, *others: Value) -> jax.Array:
            out: jax.Array
            (out,) = use.bind([*others[:place], w, *others[place:]])
            return out

        return product(bind, use.values[place].base, *others)

    return apply


def dot_general(interpreter: Interpreter, use: Use) -> Outcome:
    """Returns the product of x with a weight, in either order; None if it has no factored form."""
    weight_first = isinstance(use.values[0], Factored)
    x, weight = use.values[::-1] if weight_first else use.values
    if isinstance(x, Factored):
        return None
    dims = use.params["dimension_numbers"]
    pairs: Any = (tuple(map(tuple, pair[::-1] if weight_first else pair)) for pair in dims)
    contract, batch = pairs
    how = {n: use.params[n] for n in ("precision", "preferred_element_type", "out_sharding")}
    if not weight.parts:
        return [base_dot(x, weight.base, BaseDot(contract, batch, weight_first, how))]
    dtype = eqns.type_of(use.eqn.outvars[0]).dtype
    has_fractions = jnp.issubdtype(x.dtype, jnp.inexact)
    if not jnp.issubdtype(dtype, jnp.inexact) or (weight.gain is not None and not has_fractions):
        return None
    role = contracted_role(weight, contract[1])
    if role is None:
        return None
    check_roles(weight, contract[1], batch[1], use)
    weight = match_unit_roles(weight, role, contract[1], batch[1])
    note_side(weight, role, use)
    if weight.active is not None:
        check_order(weight, x, (*contract[0], *batch[0]), use)
    if set(contract[1]) != set(weight.axes("in")):  # the mirror image
        several_gains = weight.gain is not None and set(batch[1]) != set(weight.axes("batch"))
        check_bias(interpreter, weight, use)
        if weight.shift is not None or (several_gains and is_sharded(x)):
            return None
    are_real = all(jnp.issubdtype(v.dtype, jnp.floating) for v in (x, weight.base))
    again = use.inputs.copied(x) if are_real else x.astype(dtype)  # A and B are cast to its dtype
    how |= {"for_factors": again, "weight_first": weight_first, "rows": rows_of(weight, use)}
    if are_real:
        how["z"] = shared_product(use, int(weight_first), again, weight, contract)
    return [dot(x, weight, contract=contract, batch=batch, **how)]


def rows_of(weight: Factored, use: Use) -> ExampleColumns | None:
    """Returns the columns of rank that each row of the activation sees, where examples differ."""
    if weight.rows is None:
        return None
    assert isinstance(use.at, ExampleAxis), "an equation is refused where it is not known"
    return ExampleColumns(weight.rows, use.at.axis, use.at.inner)


def check_order(weight: Factored, x: jax.Array, used: Sequence[int], use: Use) -> None:
    """Raises TokensError unless the rows of x are in the order of the weight's mask, or all equal.

    Args:
      weight: a weight that some tokens alone see.
      x: the activation. Rows of another number than the mask's are refused later.
      used: axes of x that are contracted or batched.
      use: the product.
    """
    mask = weight.active.shape
    rows = [axis for axis in range(x.ndim) if axis not in used]
    if tuple(x.shape[axis] for axis in rows) not in (mask, (math.prod(mask),)):
        return
    varying = use.varying_axes(int(isinstance(use.values[0], Factored)))
    reason = wrong_order(use.at, rows, mask)
    if reason and not set(rows).isdisjoint(varying):
        raise TokensError(
            f"the weight {weight.path!r} acts on tokens of a mask {list(mask)}, and the rows that "
            f"{use.name!r} at {place_of(use.eqn)} multiplies it by are not known to be in their "
            f"order: {reason}. Multiply [batch, seq, …], or [batch * seq, …], whose tokens are in "
            "the order of the function's arguments, or leave the weight out of the rules"
        )


def note_side(weight: Factored, role: Label, use: Use) -> None:
    """Notes the side of a weight that a product contracts; see `lora_jax.adapt.sides`."""
    if role != "batch":
        sides.note(weight, role, lambda: place_of(use.eqn))


def contracted_role(weight: Factored, contract: Sequence[int]) -> Label | None:
    """Returns the one role of the axes that a product contracts; None where it mixes two."""
    roles = {weight.labels[axis] for axis in contract if weight.base.shape[axis] != 1}
    if roles:
        return roles.pop() if len(roles) == 1 else None
    sides: tuple[Label, Label] = ("in", "out")  # a layer of one input, or of one output
    return next((side for side in sides if math.prod(weight.sizes(side)) == 1), None)


def match_unit_roles(
    weight: Factored, role: Label, contract: Sequence[int], batch: Sequence[int]
) -> Factored:
    """Returns the weight with its axes of size one in the roles that a product uses them in."""
    labels = list(weight.labels)
    for axis, size in enumerate(weight.base.shape):
        if size == 1 and axis in contract:
            labels[axis] = role
        elif size == 1 and (axis in batch or labels[axis] == role):
            labels[axis] = "batch"
    return weight if tuple(labels) == weight.labels else weight.relabelled(weight.base, labels)


def check_roles(weight: Factored, contract: Sequence[int], batch: Sequence[int], use: Use) -> None:
    """Raises RoleError unless all in axes are contracted, or all out axes, and no other batched."""
    shape = weight.base.shape

    def long(axes: Sequence[int]) -> set[int]:
        return {axis for axis in axes if shape[axis] != 1}

    contracted, batched = long(contract), long(batch)
    whole = contracted in (long(weight.axes("in")), long(weight.axes("out")))
    if whole and batched <= set(weight.axes("batch")):
        return
    roles = ", ".join(f"{n}: {label}" for n, label in zip(shape, weight.labels, strict=True))
    sizes = " and ".join(
        f"{verb} {[shape[axis] for axis in sorted(axes)]}"
        for verb, axes in (("contracts the axes of sizes", contracted), ("batches", batched))
        if axes
    )
    raise RoleError(
        f"the weight {weight.path!r} is recorded with the axes ({roles}), but the function "
        f"{sizes} at {place_of(use.eqn)}. LoRA needs all in axes contracted, or all out axes, and "
        "batch axes left alone. Record what the function does: by hand with LoraRule(in_axes=…, "
        "out_axes=…), or by looking with lorafy(params, rules, trace=(fn, params, x))"
    )


def check_bias(interpreter: Interpreter, weight: Factored, use: Use) -> None:
    """Raises MergeError where a weight with a bias on B is met from its out axes."""
    if weight.shift is None or interpreter.record is not None:
        return
    raise MergeError(
        f"the weight {weight.path!r} has a bias on B, which is added to what comes out of its out "
        f"axes, but {use.name!r} at {place_of(use.eqn)} contracts them (a tied head, "
        "a transposed use): that product has no place for the bias, in PEFT either. Set "
        "bias_on_b=False in the rule of this weight; or, for a table that is looked up too, "
        "uses='lookup', which leaves the tied head as it was"
    )


def _conv_general_dilated(_: Interpreter, use: Use) -> Outcome:
    """Convolves with A, then multiplies by B at each place. In axes: space and input features."""
    x, weight = use.values
    params = use.params
    if isinstance(x, Factored) or params["batch_group_count"] != 1:
        return None
    if not weight.parts:
        return [base_product(use, 1)(x)]
    out_axis, *in_axes = params["dimension_numbers"].rhs_spec
    check_roles(weight, in_axes, (), use)
    weight = match_unit_roles(weight, "in", in_axes, ())
    if weight.labels[out_axis] != "out":
        return None  # all axes but one are contracted, and that one is an in axis: a mirror image
    groups = params["feature_group_count"]
    kernel = jnp.moveaxis(weight.a, 0, out_axis).astype(x.dtype)  # W's layout, r output features
    kernel = jnp.concatenate([kernel] * groups, axis=out_axis) if groups > 1 else kernel
    note_side(weight, "in", use)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    how = {name: params[name] for name in (*names, "dimension_numbers", "precision")}
    batch, features, *_ = params["dimension_numbers"].out_spec
    rows = rows_of(weight, use)

    def factor_product(x: jax.Array, weight: Factored, seen: jax.Array) -> jax.Array:
        z = lax.conv_general_dilated(
            x, kernel, **how, feature_group_count=groups, preferred_element_type=wide(x.dtype)
        )
        scales = weight.scales.astype(z.dtype)
        scales = jnp.tile(scales, groups) if scales.size > 1 else scales
        z = jnp.moveaxis(z, features, -1) * scales
        if rows is not None:  # x's batch axis is the result's
            z = z * rows.along(z, batch - (batch > features))
        z = z.astype(x.dtype)
        lead, (rank, n_out) = z.shape[:-1], weight.b.shape
        z = z.reshape(math.prod(lead), groups, rank)
        b = weight.b.astype(x.dtype).reshape(rank, groups, n_out // groups)
        dims = (((2,), (0,)), ((1,), (1,)))  # [groups, places, out / groups]
        delta = lax.dot_general(z, b, dims, params["precision"], seen.dtype)
        return jnp.moveaxis(jnp.moveaxis(delta, 0, 1).reshape(*lead, n_out), -1, features)

    def along_features(vector: jax.Array) -> jax.Array:
        out = eqns.type_of(use.eqn.outvars[0]).ndim
        return lax.expand_dims(vector, [axis for axis in range(out) if axis != features])

    return [combined(x, weight, base_product(use, 1), factor_product, along_features)]


PRODUCT_RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": _conv_general_dilated,
}
