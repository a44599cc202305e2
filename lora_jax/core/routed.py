"""Products of tokens with the kernels of their experts, on rows that are sorted by expert.

A **row** is a token with one of its experts. Rows of one expert form a group. Some rows belong to
no group: they fill up the fixed number of rows. What a kernel writes into these rows is unknown, so
`multiply_rows` sets them to zero before anything sums over rows.

`multiply_rows` and `sum_products` are functions that `lora_jax.adapt` knows by name. They get more
operands than they read: with the tokens of the rows, an adapter needs no product of rows and A.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.magnitude import accumulation_dtype

# Names of the functions below, as equations have them.
MULTIPLY_ROWS, SUM_PRODUCTS = "lora_multiply_rows", "lora_sum_products"


class Routing(NamedTuple):
    """The rows of a number of tokens, sorted by expert.

    Attributes:
      group_sizes: [experts] int32, the number of rows of each expert.
      expert_of_row: [rows] int32; the number of experts stands for no expert.
      token_of_row: [rows] int32; any token for a row of no expert.
      rows_of_token: [k, tokens] int32; the number of rows stands for no row.
    """

    group_sizes: jax.Array
    expert_of_row: jax.Array
    token_of_row: jax.Array
    rows_of_token: jax.Array


class ProductOfRows(NamedTuple):
    """The operands of `multiply_rows`.

    Attributes:
      rows: [rows, in], the tokens of the rows.
      tokens: [tokens, in]; only an adapter reads them.
      kernels: [experts, in, out] each.
      routing: the rows.
    """

    rows: jax.Array
    tokens: jax.Array
    kernels: Sequence[jax.Array]
    routing: Routing


class SumOfProducts(NamedTuple):
    """The operands of `sum_products`.

    Attributes:
      rows: [rows, in], multiplied by the routing weights.
      weights: [rows] fp32, the routing weights; only an adapter with a bias reads them.
      kernel: [experts, in, out].
      routing: the rows.
    """

    rows: jax.Array
    weights: jax.Array
    kernel: jax.Array
    routing: Routing


def multiply_rows(operands: ProductOfRows) -> list[jax.Array]:
    """Returns the products of rows with each kernel of their expert, [rows, out] each."""
    products: list[jax.Array] = _multiply_rows(operands)
    return products


def sum_products(operands: SumOfProducts) -> jax.Array:
    """Returns the sum over each token's rows of their products, [tokens, out] fp32."""
    sums: jax.Array = _sum_products(operands)
    return sums


def _multiply_rows_plainly(operands: ProductOfRows) -> list[jax.Array]:
    """Multiplies the rows by each kernel."""
    routing = operands.routing
    return [
        zero_rows_without_group(group_product(kernel, operands.rows, routing), routing)
        for kernel in operands.kernels
    ]


def _sum_products_plainly(operands: SumOfProducts) -> jax.Array:
    """Multiplies the rows, and sums the products of each token."""
    product = group_product(operands.kernel, operands.rows, operands.routing)
    return sum_rows(product, operands.routing)


_multiply_rows_plainly.__name__ = MULTIPLY_ROWS
_sum_products_plainly.__name__ = SUM_PRODUCTS
_multiply_rows = jax.jit(_multiply_rows_plainly)
_sum_products = jax.jit(_sum_products_plainly)


def group_product(kernel: jax.Array, rows: jax.Array, routing: Routing) -> jax.Array:
    """Returns the ragged product of rows; rows of no expert have unknown values."""
    return lax.ragged_dot(rows, kernel, routing.group_sizes)


def zero_rows_without_group(rows: jax.Array, routing: Routing) -> jax.Array:
    """Returns rows with zeros in place of the rows of no expert."""
    n_experts = routing.group_sizes.shape[0]
    has_expert = routing.expert_of_row < n_experts
    return jnp.where(has_expert[:, None], rows, jnp.zeros_like(rows))


def read_tokens(tokens: jax.Array, routing: Routing) -> jax.Array:
    """Returns the vector of each row's token, from [tokens, …].

    The derivative sums each token's rows in a fixed order, so that nothing is scattered.
    """
    rows: jax.Array = _read_tokens(tokens, routing.token_of_row, routing.rows_of_token)
    return rows


def sum_rows(rows: jax.Array, routing: Routing) -> jax.Array:
    """Returns the sum of each token's rows, [tokens, …] fp32; the derivative reads tokens."""
    sums: jax.Array = _sum_rows(rows, routing.token_of_row, routing.rows_of_token)
    return sums


@jax.custom_vjp
def _read_tokens(tokens: jax.Array, token_of_row: jax.Array, rows_of_token: jax.Array) -> jax.Array:
    del rows_of_token
    return tokens[token_of_row]


def _read_tokens_forward(
    tokens: jax.Array, token_of_row: jax.Array, rows_of_token: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _read_tokens(tokens, token_of_row, rows_of_token), rows_of_token


def _read_tokens_backward(
    rows_of_token: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, None, None]:
    return _sum_rows_of_tokens(cotangent, rows_of_token).astype(cotangent.dtype), None, None


_read_tokens.defvjp(_read_tokens_forward, _read_tokens_backward)


@jax.custom_vjp
def _sum_rows(rows: jax.Array, token_of_row: jax.Array, rows_of_token: jax.Array) -> jax.Array:
    del token_of_row
    return _sum_rows_of_tokens(rows, rows_of_token)


def _sum_rows_forward(
    rows: jax.Array, token_of_row: jax.Array, rows_of_token: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    empty_row = jnp.zeros((0,), rows.dtype)  # tells the dtype
    return _sum_rows(rows, token_of_row, rows_of_token), (empty_row, token_of_row)


def _sum_rows_backward(
    residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None, None]:
    empty_row, token_of_row = residuals
    return cotangent.astype(empty_row.dtype)[token_of_row], None, None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def _sum_rows_of_tokens(rows: jax.Array, rows_of_token: jax.Array) -> jax.Array:
    """Returns the sum of each token's rows, fp32; missing rows count as zeros."""
    dtype = accumulation_dtype(rows.dtype)

    def read(indices: jax.Array) -> jax.Array:
        return rows.at[indices].get(mode="fill", fill_value=0).astype(dtype)

    total = read(rows_of_token[0])
    for indices in rows_of_token[1:]:
        total = total + read(indices)
    return total
