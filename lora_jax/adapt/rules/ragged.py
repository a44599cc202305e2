"""The rule for ragged products, in which each group of sorted rows has its own weight.

The **near** factor of a weight is the one that x is multiplied by, and the **far** factor the other
one: A and B for xW, B and A for the mirror image.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.products import base_product, check_no_bias_on_b, check_roles, record_side
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.product import combine_base_and_factors, name_if_narrow
from lora_jax.core.ragged_call import ragged_product
from lora_jax.core.types import Outcome, Value

# The axes of rows, [rows, in], and kernels, [groups, in, out], as `lax.ragged_dot` has them.
_ROWS_TIMES_KERNELS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_UNIT_COLUMNS = 256  # that two passes of a TPU's matrix unit take, 128 each


class _GroupFactors(NamedTuple):
    """The factors of all groups, in the dtype of x, and the number of rows of each group.

    Attributes:
      near: [groups, r, in].
      far: [groups, r, out].
      scales: s, [groups, 1] or [groups, r].
      group_sizes: [groups] int, the number of rows of each group.
    """

    near: jax.Array
    far: jax.Array
    scales: jax.Array
    group_sizes: jax.Array


def _ragged_factor_product(
    x: jax.Array, factors: _GroupFactors, precision: lax.PrecisionLike, dtype: DTypeLike
) -> jax.Array:
    """Returns s·(xA)B with the factors of each row's group, by two ragged products.

    Args:
      x: [rows, in].
      factors: factors of the groups.
      precision: precision of the products.
      dtype: dtype of the result.

    Returns:
      [rows, out].
    """
    _, rank, n_in = factors.near.shape
    a = jnp.swapaxes(factors.near, 1, 2)
    z = lax.ragged_dot(x, a, factors.group_sizes, precision, accumulation_dtype(x.dtype))
    row_scales = vector_of_each_row(factors.scales, factors.group_sizes, x.shape[0])
    z = z * row_scales.astype(z.dtype)
    z = name_if_narrow(z.astype(x.dtype), rank, n_in)
    return lax.ragged_dot(z, factors.far, factors.group_sizes, precision, dtype)


def _joint_factor_product(
    x: jax.Array, factors: _GroupFactors, precision: lax.PrecisionLike, dtype: DTypeLike
) -> jax.Array:
    """Returns s·(xA)B by two plain products, if all groups' ranks fit a matrix unit.

    For the arguments see `_ragged_factor_product`. The first product is with all A's side by side,
    of which each row keeps its group's columns, and the second with all B's. They cost the unit no
    more than one group's, and every compiler handles them well. (XLA makes a kernel of a ragged
    product on TPU, but runs out of memory for the gradient of an A of [14336, 8]; elsewhere it
    makes a masked copy of x for each group.)
    """
    n_rows = x.shape[0]
    n_groups, rank, n_in = factors.near.shape
    group_ends = jnp.cumsum(factors.group_sizes)
    row = jnp.arange(n_rows, dtype=group_ends.dtype)[:, None]
    is_in_group = (group_ends - factors.group_sizes <= row) & (row < group_ends)
    z = jnp.einsum(  # [rows, groups, r]
        "mi,gri->mgr",
        x,
        factors.near,
        precision=precision,
        preferred_element_type=accumulation_dtype(x.dtype),
    )
    is_own_column = is_in_group[:, :, None]
    z = z * factors.scales.astype(z.dtype)
    z = jnp.where(is_own_column, z, jnp.zeros_like(z)).astype(x.dtype)
    z = z.reshape(n_rows, -1)
    b = factors.far.reshape(-1, factors.far.shape[2])
    z = name_if_narrow(z, n_groups * rank, n_in)
    return lax.dot(z, b, precision=precision, preferred_element_type=dtype)


def vector_of_each_row(vectors: jax.Array, group_sizes: jax.Array, n_rows: int) -> jax.Array:
    """Returns the vector of each row's group, from vectors [groups, …]."""
    group_ends = jnp.cumsum(group_sizes)
    group_of_row = jnp.searchsorted(
        group_ends, jnp.arange(n_rows, dtype=group_ends.dtype), side="right"
    )
    return jnp.take(vectors, group_of_row, axis=0, mode="clip")


def _ragged_dot_general(interpreter: Interpreter, use: Use) -> Outcome:
    """Multiplies tokens sorted by expert; each group has its own A, B and s."""
    x, weight, group_sizes = use.values
    if isinstance(x, Factored) or isinstance(group_sizes, Factored):
        return None
    if not weight.parts:
        return [_base_product(use)(x)]
    if not _is_product_of_rows(x, weight, use):
        return None
    dimension_numbers = use.params["ragged_dot_dimension_numbers"]
    (_, (contracted_axis,)), _ = dimension_numbers.dot_dimension_numbers
    check_roles(weight, (contracted_axis,), (), use)
    near, far = weight.a, weight.b  # [groups, r, …] each
    role = weight.labels[contracted_axis]
    record_side(weight, role, use)
    is_mirror_image = role != "in"
    if is_mirror_image:
        check_no_bias_on_b(interpreter, weight, use)
        if weight.shift is not None:
            return None
        if weight.gain is not None:
            x = x * vector_of_each_row(weight.gain, group_sizes, x.shape[0]).astype(x.dtype)
            weight = weight.replace(gain=None)
        near, far = far, near

    def factor_product(x: jax.Array, weight: Factored, base_result: jax.Array) -> jax.Array:
        """Returns s·(xA)B in the cheaper of its two forms."""
        factors = _GroupFactors(
            scales=weight.scales,
            near=near.astype(x.dtype),
            far=far.astype(x.dtype),
            group_sizes=group_sizes,
        )
        n_groups, rank, _ = near.shape
        fits_into_unit = n_groups * rank <= _UNIT_COLUMNS
        multiply = _joint_factor_product if fits_into_unit else _ragged_factor_product
        return multiply(x, factors, use.params["precision"], base_result.dtype)

    def vector_of_row(vectors: jax.Array) -> jax.Array:
        return vector_of_each_row(vectors, group_sizes, x.shape[0])

    return [combine_base_and_factors(x, weight, _base_product(use), factor_product, vector_of_row)]


def _base_product(use: Use) -> Callable[[Value], jax.Array]:
    """Returns the product with W as a function of x: by a kernel where quantized W has one."""
    _, weight, group_sizes = use.values
    dimension_numbers = use.params["ragged_dot_dimension_numbers"]
    if dimension_numbers != _ROWS_TIMES_KERNELS or use.params["group_offset"] is not None:
        return base_product(use, 1)

    def bind(w: jax.Array, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Applies the equation with W as an array."""
        result: jax.Array
        (result,) = use.bind([x, w, group_sizes])
        return result

    def multiply(x: Value) -> jax.Array:
        return ragged_product(bind, weight.base, x, group_sizes, use.params)

    return multiply


def _is_product_of_rows(x: jax.Array, weight: Factored, use: Use) -> bool:
    """Returns True for a ragged product of [rows, in] with a stack [groups, in, out]."""
    dimension_numbers = use.params["ragged_dot_dimension_numbers"]
    (x_contract, _), batch = dimension_numbers.dot_dimension_numbers
    return (
        use.params["group_offset"] is None
        and not any(batch)
        and tuple(dimension_numbers.lhs_ragged_dimensions) == (0,)
        and (x.ndim, len(weight.labels), tuple(x_contract)) == (2, 3, (1,))
        and weight.labels[dimension_numbers.rhs_group_dimensions[0]] == "batch"
    )


RAGGED_RULES: dict[str, Rule] = {"ragged_dot_general": _ragged_dot_general}
