"""The rules for products with experts' kernels on sorted rows; see `lora_jax.core.routed`.

Factors are applied by token where that is possible: xA of all experts is one dense product of the
tokens, and the zB of a sum is one dense product of each token's z. Elsewhere a row has the columns
of all experts, and zeros in those of other experts.

The **columns** of a weight are those of all experts' A's side by side, [experts * r].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt.interpreter import Interpreter, Use
from lora_jax.core.base import product
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import accumulation_dtype, rescale_columns
from lora_jax.core.names import FACTORS
from lora_jax.core.product import combine_base_and_factors
from lora_jax.core.routed import (
    MULTIPLY_ROWS,
    SUM_PRODUCTS,
    ProductOfRows,
    Routing,
    SumOfProducts,
    group_product,
    read_tokens,
    sum_rows,
    zero_rows_without_group,
)
from lora_jax.core.types import Outcome, Value

_MAX_COLUMNS = 2048  # beyond that, dense products with all experts cost more than ragged ones


def _multiply_rows(_: Interpreter, use: Use) -> Outcome:
    """Multiplies rows by kernels; all adapted kernels share one product of tokens and A's."""
    rows, tokens, *kernels, sizes, expert_of_row, token_of_row, rows_of_token = use.values
    routing = Routing(sizes, expert_of_row, token_of_row, rows_of_token)
    operands = ProductOfRows(rows, tokens, kernels, routing)
    adapted = [kernel for kernel in kernels if isinstance(kernel, Factored)]
    if not _have_dense_form(adapted):
        return None
    with jax.named_scope(FACTORS):
        z = _scaled_products_with_a(operands.tokens, adapted)
        z_of_weights = lax.split(read_tokens(z, routing), list(map(_n_columns, adapted)), axis=1)
    remaining_z = iter(z_of_weights)

    def multiply(kernel: Value) -> jax.Array:
        """Returns the products of the rows with one kernel."""
        if not isinstance(kernel, Factored):
            return group_product(kernel, rows, routing)
        z_of_rows = _own_columns(next(remaining_z), kernel, routing)

        def factor_product(_: jax.Array, weight: Factored, base_result: jax.Array) -> jax.Array:
            return _product_with_b(z_of_rows, weight.b, base_result.dtype)

        return combine_base_and_factors(
            rows, kernel, _base_product(kernel, routing), factor_product, _vectors_of_rows(routing)
        )

    return [zero_rows_without_group(multiply(kernel), routing) for kernel in kernels]


def _sum_products(_: Interpreter, use: Use) -> Outcome:
    """Sums products; the z of each token's rows are brought to the token before B is applied."""
    rows, weights, weight, *routing_arrays = use.values
    routing = Routing(*routing_arrays)
    operands = SumOfProducts(rows, weights, weight, routing)
    if not _have_dense_form([weight]):
        return None
    out = _base_product(weight, routing)(operands.rows)
    b = weight.b
    vector_of_row = _vectors_of_rows(routing)
    if weight.gain is not None:
        out = rescale_columns(out, vector_of_row(weight.gain))
        dtype = accumulation_dtype(b.dtype)
        b = b.astype(dtype) * weight.gain[:, None].astype(dtype)
    if weight.shift is not None:
        row_weights = operands.weights[:, None]
        shift = vector_of_row(weight.shift).astype(row_weights.dtype) * row_weights
        out = out + shift.astype(out.dtype)
    sums = sum_rows(out, routing)
    with jax.named_scope(FACTORS):
        z = _own_columns(_scaled_products_with_a(rows, [weight]), weight, routing)
        z_of_tokens = sum_rows(z, routing).astype(rows.dtype)
        delta = _product_with_b(z_of_tokens, b, sums.dtype)
    return [sums + delta]


def _have_dense_form(weights: list[Factored]) -> bool:
    """Returns True if each weight has factors that dense products may apply to all rows."""
    return bool(weights) and all(map(_has_dense_form, weights))


def _has_dense_form(weight: Factored) -> bool:
    is_plain = weight.key is None and weight.rows is None and weight.active is None
    is_stack_of_matrices = weight.labels == ("batch", "in", "out")
    has_factors = bool(weight.parts)
    return has_factors and is_plain and is_stack_of_matrices and _n_columns(weight) <= _MAX_COLUMNS


def _n_columns(weight: Factored) -> int:
    return math.prod(weight.sizes("batch")) * weight.rank


def _base_product(weight: Factored, routing: Routing) -> Callable[[Value], jax.Array]:
    """Returns the product of rows with W as a function of the rows."""

    def multiply(rows: jax.Array) -> jax.Array:
        out = product(lambda w, rows: group_product(w, rows, routing), weight.base, rows)
        # The derivative of a gain sums over all rows.
        return out if weight.gain is None else zero_rows_without_group(out, routing)

    return multiply


def _scaled_products_with_a(x: jax.Array, weights: list[Factored]) -> jax.Array:
    """Returns s·xA of all experts and of several weights side by side, in the dtype of x."""
    a_of_weights = []
    scales_of_weights = []
    for weight in weights:
        a = weight.a.astype(x.dtype)  # [experts, r, in]
        scales = jnp.broadcast_to(weight.scales, a.shape[:2])
        a_of_weights.append(a.reshape(-1, a.shape[2]))
        scales_of_weights.append(scales.reshape(-1))
    z = lax.dot_general(
        x,
        jnp.concatenate(a_of_weights),
        (((1,), (1,)), ((), ())),
        preferred_element_type=accumulation_dtype(x.dtype),
    )
    return (z * jnp.concatenate(scales_of_weights).astype(z.dtype)).astype(x.dtype)


def _own_columns(z: jax.Array, weight: Factored, routing: Routing) -> jax.Array:
    """Returns z of rows, [rows, experts * r], with zeros in the columns of other experts."""
    expert_of_column = jnp.arange(z.shape[1], dtype=jnp.int32) // weight.rank
    is_own = routing.expert_of_row[:, None] == expert_of_column
    return jnp.where(is_own, z, jnp.zeros_like(z))


def _product_with_b(z: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns zB, with the B's of all experts one below the other."""
    b = b.astype(z.dtype).reshape(-1, b.shape[2])
    return lax.dot(z, b, preferred_element_type=dtype)


def _vectors_of_rows(routing: Routing) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from vectors [experts, …] to those of each row's expert."""

    def vector_of_row(vectors: jax.Array) -> jax.Array:
        return jnp.take(vectors, routing.expert_of_row, axis=0, mode="clip")

    return vector_of_row


# By the name of the function that a `jit` equation calls.
ROUTED_RULES = {MULTIPLY_ROWS: _multiply_rows, SUM_PRODUCTS: _sum_products}
