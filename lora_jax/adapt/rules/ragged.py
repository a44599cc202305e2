"""The rule for ragged products: rows sorted by group, each group with a weight of its own."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.rules.products import base_product, check_bias, check_roles, note_side
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import wide
from lora_jax.core.product import combined, named_if_narrow
from lora_jax.core.types import EqnParams, Outcome

_UNIT = 256  # columns that two passes of a TPU's matrix unit take, 128 each


def _through_factors(
    x: jax.Array,
    near: jax.Array,
    far: jax.Array,
    scales: jax.Array,
    sizes: jax.Array,
    precision: lax.PrecisionLike,
    dtype: DTypeLike,
) -> jax.Array:
    """Returns s·(xA)B of each row, with its group's A, B and s.

    Where the ranks of all groups fit into a matrix unit, these are two plain products: with all A's
    side by side, of which each row keeps its group's columns, and with all B's. They cost the unit
    no more than one group's, and every compiler handles them well. (XLA makes a kernel of a ragged
    product on TPU, but runs out of memory for the gradient of an A of [14336, 8]; elsewhere it
    makes a masked copy of x for each group.)

    Args:
      x: [rows, in].
      near, far: A, [groups, r, in], and B, [groups, r, out].
      scales: s, [groups, 1] or [groups, r].
      sizes: [groups] int, the rows of each group.
      precision: precision of the products.
      dtype: dtype of the result.

    Returns:
      [rows, out].
    """
    near, far = near.astype(x.dtype), far.astype(x.dtype)
    groups, rank, contracted = near.shape
    if groups * rank > _UNIT:
        z = lax.ragged_dot(x, jnp.swapaxes(near, 1, 2), sizes, precision, wide(x.dtype))
        z = z * group_vectors(scales, sizes, x.shape[0]).astype(z.dtype)
        z = named_if_narrow(z.astype(x.dtype), rank, contracted)
        return lax.ragged_dot(z, far, sizes, precision, dtype)
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0], dtype=ends.dtype)[:, None]
    own = (ends - sizes <= row) & (row < ends)  # [rows, groups]
    how: EqnParams = {"precision": precision, "preferred_element_type": wide(x.dtype)}
    z = jnp.einsum("mi,gri->mgr", x, near, **how)
    z = jnp.where(own[:, :, None], z * scales.astype(z.dtype), jnp.zeros_like(z)).astype(x.dtype)
    z, far = z.reshape(x.shape[0], -1), far.reshape(-1, far.shape[2])
    z = named_if_narrow(z, groups * rank, contracted)
    return lax.dot(z, far, precision=precision, preferred_element_type=dtype)


def group_vectors(vectors: jax.Array, sizes: jax.Array, n: int) -> jax.Array:
    """Returns the vector, one of [groups, …], of the group that each of n rows belongs to."""
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(n, dtype=ends.dtype), side="right")
    return jnp.take(vectors, group, axis=0, mode="clip")


def _ragged_dot_general(interpreter: Interpreter, use: Use) -> Outcome:
    """Multiplies tokens that are sorted by expert: each group has its own A, B and s."""
    x, weight, sizes = use.values
    numbers = use.params["ragged_dot_dimension_numbers"]
    ((x_contract, w_contract), batch) = numbers.dot_dimension_numbers
    if isinstance(x, Factored) or isinstance(sizes, Factored):
        return None
    if not weight.parts:
        return [base_product(use, 1)(x)]
    if (
        use.params["group_offset"] is not None
        or any(batch)
        or tuple(numbers.lhs_ragged_dimensions) != (0,)
        or (x.ndim, len(weight.labels), tuple(x_contract)) != (2, 3, (1,))
        or weight.labels[numbers.rhs_group_dimensions[0]] != "batch"
    ):
        return None
    check_roles(weight, w_contract, (), use)
    near, far = weight.a, weight.b  # [groups, r, …] each

    note_side(weight, weight.labels[w_contract[0]], use)
    if weight.labels[w_contract[0]] != "in":
        check_bias(interpreter, weight, use)
        if weight.shift is not None:
            return None
        if weight.gain is not None:
            x = x * group_vectors(weight.gain, sizes, x.shape[0]).astype(x.dtype)
        near, far, weight = far, near, weight.replace(gain=None)

    def factor_product(x: jax.Array, weight: Factored, seen: jax.Array) -> jax.Array:
        how = (weight.scales, sizes, use.params["precision"], seen.dtype)
        return _through_factors(x, near, far, *how)

    def placed(vector: jax.Array) -> jax.Array:
        return group_vectors(vector, sizes, x.shape[0])

    return [combined(x, weight, base_product(use, 1), factor_product, placed)]


RAGGED_RULES: dict[str, Rule] = {"ragged_dot_general": _ragged_dot_general}
