"""Rules for primitives that multiply by a weight: xW + s·(xA)B in place of xW.

Weights that multiply the very same x (q, k and v; gate and up) have one product xA.
The **side** of an operand is its index, 0 or 1, in a product of two operands.
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
from lora_jax.adapt.per_example.tokens import wrong_order_reason
from lora_jax.adapt.user_code import user_line_of
from lora_jax.core.axes import Label
from lora_jax.core.base import product
from lora_jax.core.extend import JaxprEqn, varying_mesh_axes
from lora_jax.core.factored import Factored, TokensError
from lora_jax.core.few_rows import BaseDot, Dims, base_dot
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.names import FACTORS
from lora_jax.core.product import (
    ExampleColumns,
    ProductCall,
    combine_base_and_factors,
    dot,
    has_dropout,
    has_explicit_sharding,
    scaled_product,
)
from lora_jax.core.types import Outcome, Value


def shared_product(
    use: Use, side: int, x: jax.Array, weight: Factored, contract: Dims
) -> jax.Array | None:
    """Returns s·xA, cut out of one joint product for all weights that multiply this x.

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
    known_products = use.inputs.known_products
    if id(use.eqn) in known_products:
        return known_products.pop(id(use.eqn))
    shareable_form = _shareable_form(weight, contract[1])
    if shareable_form is None or has_explicit_sharding(x):
        return None
    weight_of_eqn = {id(use.eqn): weight}  # by identity
    for eqn, x_side in use.inputs.other_products(use.eqn, side):
        other_weight = _weight_of_later_product(use, eqn, 1 - x_side)
        if other_weight is None or eqn.params["precision"] != use.params["precision"]:
            continue
        other_contract = eqn.params["dimension_numbers"][0][1 - x_side]
        if _shareable_form(other_weight, other_contract) == shareable_form:
            weight_of_eqn[id(eqn)] = other_weight
    weights = list(weight_of_eqn.values())
    n_weights = len(weights)
    ranks = [sharing_weight.rank for sharing_weight in weights]
    call = ProductCall(contract, params={"precision": use.params["precision"]})
    n_rows = math.prod(x.shape[axis] for axis in call.x_free(x))
    # One product reads the rows of x once, but writes and reads a copy of the rows of all A's.
    saves_memory_traffic = (n_weights - 1) * n_rows > 2 * sum(ranks)
    if not saves_memory_traffic:
        return None
    with jax.named_scope(FACTORS):
        z = scaled_product(x, _join_by_rank(weights, x), call, n_weights=n_weights)
        z_of_weights = lax.split(z, ranks, axis=z.ndim - 1)
        known_products.update(zip(weight_of_eqn, z_of_weights, strict=True))
    return known_products.pop(id(use.eqn))


def _weight_of_later_product(use: Use, eqn: JaxprEqn, side: int) -> Factored | None:
    """Returns the weight on a side of a later product, or None if it is not known yet."""
    value = use.inputs.value_ahead(eqn.invars[side])
    if isinstance(value, Factored):
        value = value.seen_by_use("product")
    return value if isinstance(value, Factored) else None


def _join_by_rank(weights: Sequence[Factored], x: jax.Array) -> Factored:
    """Returns a weight whose A is the A's of several weights concatenated along the rank."""
    a = jnp.concatenate([weight.a.astype(x.dtype) for weight in weights])
    scales = [jnp.broadcast_to(weight.scales, (weight.rank,)) for weight in weights]
    unit_scale = jnp.ones((), scales[0].dtype)
    return weights[0].replace(a=a, scale=unit_scale, lambda_d=jnp.concatenate(scales))


def _shareable_form(weight: Factored, contract: Sequence[int]) -> Hashable | None:
    """Returns a key that is equal for weights that can share one product with A, or None.

    It cannot where x is dropped out for it, where examples have adapters of their own, where A
    belongs to a stack or follows from other arrays, and in the mirror image.
    """
    if not weight.parts or weight.is_compact or has_dropout(weight) or weight.rows is not None:
        return None
    in_axes = weight.axes("in")
    a = weight.parts["a"]
    is_mirror_image = set(contract) != set(in_axes)
    if weight.axes("batch") or is_mirror_image or has_explicit_sharding(a):
        return None
    if not jnp.issubdtype(weight.base.dtype, jnp.floating):
        return None
    order = tuple(in_axes.index(axis) for axis in contract)
    return order, weight.sizes("in"), varying_mesh_axes(a)


def base_product(use: Use, side: int) -> Callable[[Value], jax.Array]:
    """Returns the product with W as a function of the first other operand, x."""

    def multiply(x: jax.Array) -> jax.Array:
        """Multiplies x by W, which may be quantized."""
        other_operands = [value for index, value in enumerate(use.values) if index != side]
        other_operands[0] = x

        def bind(w: jax.Array, *other_operands: Value) -> jax.Array:
            """Applies the equation with W as an array."""
            operands = [*other_operands]
            operands.insert(side, w)
            result: jax.Array
            (result,) = use.bind(operands)
            return result

        return product(bind, use.values[side].base, *other_operands)

    return multiply


def dot_general(interpreter: Interpreter, use: Use) -> Outcome:
    """Returns the product of x with a weight, in either order, or None without a factored form."""
    weight_first = isinstance(use.values[0], Factored)
    x_side, weight_side = (1, 0) if weight_first else (0, 1)
    x = use.values[x_side]
    weight = use.values[weight_side]
    if isinstance(x, Factored):
        return None
    contract, batch = (
        (tuple(axes[x_side]), tuple(axes[weight_side])) for axes in use.params["dimension_numbers"]
    )
    names = ("precision", "preferred_element_type", "out_sharding")
    params = {name: use.params[name] for name in names}
    if not weight.parts:
        return [base_dot(x, weight.base, BaseDot(contract, batch, weight_first, params))]
    result_dtype = eqns.type_of(use.eqn.outvars[0]).dtype
    is_gain_of_integers = weight.gain is not None and not jnp.issubdtype(x.dtype, jnp.inexact)
    if not jnp.issubdtype(result_dtype, jnp.inexact) or is_gain_of_integers:
        return None
    role = contracted_role(weight, contract[1])
    if role is None:
        return None
    check_roles(weight, contract[1], batch[1], use)
    weight = match_unit_roles(weight, role, contract[1], batch[1])
    record_side(weight, role, use)
    if weight.active is not None:
        check_token_order(weight, x, (*contract[0], *batch[0]), use)
    is_mirror_image = set(contract[1]) != set(weight.axes("in"))
    if is_mirror_image:
        check_no_bias_on_b(interpreter, weight, use)
        has_several_gains = weight.gain is not None and set(batch[1]) != set(weight.axes("batch"))
        if weight.shift is not None or (has_several_gains and has_explicit_sharding(x)):
            return None
    are_real = all(jnp.issubdtype(array.dtype, jnp.floating) for array in (x, weight.base))
    # A and B are cast to the dtype of the x that they read.
    x_for_factors = use.inputs.copy_for_factors(x) if are_real else x.astype(result_dtype)
    example_columns = example_columns_of(weight, use)
    z = shared_product(use, x_side, x_for_factors, weight, contract) if are_real else None
    result = dot(
        x,
        weight,
        for_factors=x_for_factors,
        contract=contract,
        batch=batch,
        weight_first=weight_first,
        rows=example_columns,
        z=z,
        **params,
    )
    return [result]


def example_columns_of(weight: Factored, use: Use) -> ExampleColumns | None:
    """Returns the columns of the rank that each row of x uses, if examples have adapters."""
    if weight.rows is None:
        return None
    examples = use.activation_label
    assert isinstance(examples, ExampleAxis), "an equation is refused where it is not known"
    return ExampleColumns(weight.rows, examples.axis, examples.n_consecutive)


def check_token_order(weight: Factored, x: jax.Array, used_axes: Sequence[int], use: Use) -> None:
    """Raises TokensError unless the rows of x are in the order of the weight's mask.

    Args:
      weight: a weight that some tokens alone see.
      x: the activation. Rows of another number than the mask's are refused later.
      used_axes: axes of x that are contracted or batched.
      use: the product.
    """
    mask_shape = weight.active.shape
    row_axes = [axis for axis in range(x.ndim) if axis not in used_axes]
    row_shape = tuple(x.shape[axis] for axis in row_axes)
    are_rows_of_mask = row_shape in (mask_shape, (math.prod(mask_shape),))
    if not are_rows_of_mask:
        return
    x_side = int(isinstance(use.values[0], Factored))
    are_rows_equal = set(row_axes).isdisjoint(use.varying_axes(x_side))
    reason = wrong_order_reason(use.activation_label, row_axes, mask_shape)
    if reason and not are_rows_equal:
        raise TokensError(
            f"The weight {weight.path!r} acts on tokens of a mask {list(mask_shape)}, but "
            f"{use.name!r} at {user_line_of(use.eqn)} multiplies it by rows of which the order of "
            f"tokens is unknown, because {reason}. Multiply it by [batch, seq, …] or "
            "[batch * seq, …], with tokens in the order of the function's arguments. Or exclude "
            "the weight from the rules."
        )


def record_side(weight: Factored, role: Label, use: Use) -> None:
    """Records the side of a weight that a product contracts; see `lora_jax.adapt.sides`."""
    if role != "batch":
        sides.note_side(weight, role, use.eqn)


def contracted_role(weight: Factored, contract: Sequence[int]) -> Label | None:
    """Returns the role of the axes that a product contracts, or None if it mixes two roles."""
    roles = {weight.labels[axis] for axis in contract if weight.base.shape[axis] != 1}
    if len(roles) > 1:
        return None
    if roles:
        return roles.pop()
    # Only axes of size one are contracted: the weight is a layer of one input, or of one output.
    if math.prod(weight.sizes("in")) == 1:
        return "in"
    return "out" if math.prod(weight.sizes("out")) == 1 else None


def match_unit_roles(
    weight: Factored, role: Label, contract: Sequence[int], batch: Sequence[int]
) -> Factored:
    """Returns the weight with the roles of its size-one axes set as a product uses them."""
    labels = list(weight.labels)
    for axis, size in enumerate(weight.base.shape):
        if size != 1:
            continue
        if axis in contract:
            labels[axis] = role
        elif axis in batch or labels[axis] == role:
            labels[axis] = "batch"
    return (
        weight
        if tuple(labels) == weight.labels
        else weight.with_base_and_labels(weight.base, labels)
    )


def check_roles(weight: Factored, contract: Sequence[int], batch: Sequence[int], use: Use) -> None:
    """Raises RoleError unless a product contracts all in axes or all out axes of a weight."""
    shape = weight.base.shape

    def without_unit_axes(axes: Sequence[int]) -> set[int]:
        return {axis for axis in axes if shape[axis] != 1}

    contracted_axes = without_unit_axes(contract)
    batched_axes = without_unit_axes(batch)
    in_axes = without_unit_axes(weight.axes("in"))
    out_axes = without_unit_axes(weight.axes("out"))
    if contracted_axes in (in_axes, out_axes) and batched_axes <= set(weight.axes("batch")):
        return
    roles = ", ".join(f"{size}: {label}" for size, label in zip(shape, weight.labels, strict=True))
    actions = []
    if contracted_axes:
        sizes = [shape[axis] for axis in sorted(contracted_axes)]
        actions.append(f"contracts the axes of sizes {sizes}")
    if batched_axes:
        actions.append(f"batches {[shape[axis] for axis in sorted(batched_axes)]}")
    raise RoleError(
        f"The weight {weight.path!r} is recorded with the axes ({roles}), but the function "
        f"{' and '.join(actions)} at {user_line_of(use.eqn)}. A product must contract all in axes "
        "or all out axes, and no batch axes. Let lorafy read the roles with "
        "lorafy(params, rules, trace=(fn, params, x)), or give them in "
        "LoraRule(in_axes=…, out_axes=…)."
    )


def check_no_bias_on_b(interpreter: Interpreter, weight: Factored, use: Use) -> None:
    """Raises MergeError if a product contracts the out axes of a weight with a bias on B."""
    if weight.shift is None or interpreter.record is not None:
        return
    raise MergeError(
        f"The weight {weight.path!r} has a bias on B, which belongs to its out axes, but "
        f"{use.name!r} at {user_line_of(use.eqn)} contracts these axes (a tied head, a transposed "
        "use). Such a product has no place for the bias, as in PEFT. Set bias_on_b=False in the "
        "rule of this weight. For a table that is also looked up, you can set uses='lookup' "
        "instead, so that the tied head has no adapter."
    )


def _conv_general_dilated(_: Interpreter, use: Use) -> Outcome:
    """Convolves x with A, then multiplies each position by B."""
    x, weight = use.values
    params = use.params
    if isinstance(x, Factored) or params["batch_group_count"] != 1:
        return None
    if not weight.parts:
        return [base_product(use, 1)(x)]
    out_axis, *in_axes = params["dimension_numbers"].rhs_spec
    check_roles(weight, in_axes, (), use)
    weight = match_unit_roles(weight, "in", in_axes, ())
    is_mirror_image = weight.labels[out_axis] != "out"  # the axis that comes out is an in axis
    if is_mirror_image:
        return None
    n_groups = params["feature_group_count"]
    kernel = _convolution_kernel(weight, x, out_axis, n_groups)
    record_side(weight, "in", use)
    batch_axis, feature_axis, *_ = params["dimension_numbers"].out_spec
    example_columns = example_columns_of(weight, use)

    def factor_product(x: jax.Array, weight: Factored, base_result: jax.Array) -> jax.Array:
        """Returns s·(xA)B, with xA as a convolution."""
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        z = lax.conv_general_dilated(
            x,
            kernel,
            **{name: params[name] for name in (*names, "dimension_numbers", "precision")},
            feature_group_count=n_groups,
            preferred_element_type=accumulation_dtype(x.dtype),
        )
        scales = weight.scales.astype(z.dtype)
        if scales.size > 1:
            scales = jnp.tile(scales, n_groups)
        z = jnp.moveaxis(z, feature_axis, -1) * scales
        if example_columns is not None:
            n_axes_moved = int(batch_axis > feature_axis)
            z = z * example_columns.along(z, batch_axis - n_axes_moved)
        delta = _grouped_product_with_b(
            z.astype(x.dtype), weight, n_groups, params["precision"], base_result.dtype
        )
        return jnp.moveaxis(delta, -1, feature_axis)

    def along_features(vector: jax.Array) -> jax.Array:
        ndim = eqns.type_of(use.eqn.outvars[0]).ndim
        return lax.expand_dims(vector, [axis for axis in range(ndim) if axis != feature_axis])

    return [
        combine_base_and_factors(x, weight, base_product(use, 1), factor_product, along_features)
    ]


def _convolution_kernel(weight: Factored, x: jax.Array, out_axis: int, n_groups: int) -> jax.Array:
    """Returns A in W's layout, with r output features for each group, in the dtype of x."""
    kernel = jnp.moveaxis(weight.a, 0, out_axis).astype(x.dtype)
    return jnp.concatenate([kernel] * n_groups, axis=out_axis) if n_groups > 1 else kernel


def _grouped_product_with_b(
    z: jax.Array, weight: Factored, n_groups: int, precision: Any, dtype: Any
) -> jax.Array:
    """Returns zB, computed separately for each group of output features.

    Args:
      z: s·xA, [places…, groups * r].
      weight: the weight, whose B is [r, out].
      n_groups: the number of groups.
      precision: precision of the product.
      dtype: dtype of the result.

    Returns:
      [places…, out].
    """
    place_shape = z.shape[:-1]
    rank, n_out = weight.b.shape
    z = z.reshape(math.prod(place_shape), n_groups, rank)
    b = weight.b.astype(z.dtype).reshape(rank, n_groups, n_out // n_groups)
    dims = (((2,), (0,)), ((1,), (1,)))  # contracts the rank, and batches the groups
    delta = lax.dot_general(z, b, dims, precision, dtype)  # [groups, places, out / groups]
    return jnp.moveaxis(delta, 0, 1).reshape(*place_shape, n_out)


PRODUCT_RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": _conv_general_dilated,
}
