"""Computes one shard of a mixture's experts for the tokens that chose them.

A pair is a token with one of its k experts, and a row is the place of a pair in the experts' input.
Tokens are read into the rows of their experts, and rows are read back into the sums of tokens: each
is the other's derivative, so that nothing is scattered, sums have a fixed order, and no array holds
all pairs of a batch. A turn is a fixed number of rows.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.routed import (
    ProductOfRows,
    Routing,
    SumOfProducts,
    multiply_rows,
    read_tokens,
    sum_products,
    sum_rows,
)
from lora_jax.core.turns import add_turns
from lora_jax.models.decoder.experts import Experts, GatedActivation, uses_ragged_products
from lora_jax.models.layers.trunk import PRODUCTS, name_mlp_product

UNEVEN = "uneven_choice_of_experts"  # scope of what runs if a part has more rows than its share
_SLACK = 1.25  # rows of the first turn, over an equal share of the pairs
_SUBLANES = 8  # a turn's rows are a multiple; see `experts`


class _SortedPairs(NamedTuple):
    """All pairs, sorted by expert; those of other parts come last.

    Attributes:
      pair_of_row: [rows] int32, filled up to whole turns.
      row_of_pair: [k, tokens] int32; the number of pairs for one of another part.
      group_ends: [experts] int32, the row behind the last one of each expert.
    """

    pair_of_row: jax.Array
    row_of_pair: jax.Array
    group_ends: jax.Array


class _Turn(NamedTuple):
    """The rows of one turn, and what it multiplies them by.

    Attributes:
      tokens: [tokens, d_model].
      weights: [rows] fp32, the routing weights; zeros for rows of no expert.
      routing: the rows.
      kernels, biases: see `experts.Experts`.
    """

    tokens: jax.Array
    weights: jax.Array
    routing: Routing
    kernels: Sequence[jax.Array]
    biases: Sequence[jax.Array]


def apply_part_of_experts(
    experts: Experts,
    shares: int,
    gated: GatedActivation,
    tokens: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    *kernels: jax.Array,
    biases: Sequence[jax.Array] = (),
) -> jax.Array:
    """Applies one shard of the experts, and returns each token's weighted sum.

    It takes `_SLACK` times the pairs that it has if all experts are chosen equally often. What is
    left over goes in further turns, of which there are none as a rule: no pair is lost, whatever
    the choice.

    Args:
      experts: the implementation.
      shares: the number of parts.
      gated, kernels, biases: see `experts.Experts`.
      tokens: [tokens, d_model].
      weights: [k, tokens] fp32.
      chosen: [k, tokens] int; a number outside 0 … experts - 1 is one of another part.

    Returns:
      [tokens, d_model] fp32, without the experts of other parts.
    """
    n_pairs = chosen.size
    # A turn has room for an equal share of all pairs and some more, in whole tiles of rows.
    share_tiles = -(-round(_SLACK * n_pairs) // (_SUBLANES * shares))
    all_tiles = -(-n_pairs // _SUBLANES)
    turn_rows = _SUBLANES * min(share_tiles, all_tiles)
    pairs = _sort_pairs(chosen, kernels[0].shape[0], turn_rows)
    # For the count of FLOPs: kernels skip the rows that belong to no expert.
    grouped_rows = min(turn_rows, -(-n_pairs // shares))
    run = jax.named_scope(f"rows_{grouped_rows}_of_{turn_rows}")(_run_by_kernels)
    if not uses_ragged_products(experts, turn_rows, kernels):
        run = functools.partial(_run_experts, experts)

    def run_turn(
        index: jax.Array,
        tokens: jax.Array,
        weights: jax.Array,
        pairs: _SortedPairs,
        kernels: Sequence[jax.Array],
        biases: Sequence[jax.Array],
    ) -> jax.Array:
        """Returns the sums over one block of rows."""
        routing, row_weights = _rows_of_turn(index, turn_rows, weights, pairs)
        return run(gated, _Turn(tokens, row_weights, routing, kernels, biases))

    operands = (tokens, weights, pairs, kernels, biases)
    n_own = pairs.group_ends[-1]
    total = run_turn(jnp.zeros_like(n_own), *operands)
    if turn_rows >= n_pairs:  # one turn has room for all pairs
        return total

    def run_further_turn(index: jax.Array, *operands: Any) -> jax.Array:
        return run_turn(index + 1, *operands)

    # Further turns run only if this part has more pairs than the first turn has rows.
    n_further_turns = jnp.maximum(0, -(-n_own // turn_rows) - 1)
    with jax.named_scope(UNEVEN):
        return add_turns(run_further_turn, n_further_turns, total, *operands)


def _sort_pairs(chosen: jax.Array, n_experts: int, turn_rows: int) -> _SortedPairs:
    """Sorts the pairs by expert, in whole turns of rows; see `apply_part_of_experts`."""
    n_pairs = chosen.size
    is_own = (chosen >= 0) & (chosen < n_experts)
    expert_of_pair = jnp.where(is_own, chosen, n_experts).reshape(-1).astype(jnp.int32)
    pair_of_row = jnp.argsort(expert_of_pair).astype(jnp.int32)  # stable
    row_of_pair = jnp.argsort(pair_of_row).astype(jnp.int32).reshape(chosen.shape)
    expert_ids = jnp.arange(n_experts, dtype=jnp.int32)
    group_sizes = jnp.sum(expert_of_pair == expert_ids[:, None], axis=1, dtype=jnp.int32)
    return _SortedPairs(
        pair_of_row=jnp.pad(pair_of_row, (0, -n_pairs % turn_rows)),
        row_of_pair=jnp.where(is_own, row_of_pair, n_pairs),
        group_ends=jnp.cumsum(group_sizes, dtype=jnp.int32),
    )


def _rows_of_turn(
    index: jax.Array, turn_rows: int, weights: jax.Array, pairs: _SortedPairs
) -> tuple[Routing, jax.Array]:
    """Returns the rows of a turn, and their routing weights, [rows] fp32.

    Args:
      index: [] int, the turn.
      turn_rows: the number of its rows.
      weights: [k, tokens] fp32.
      pairs: all pairs.
    """
    n_tokens = weights.shape[1]
    start = index.astype(jnp.int32) * turn_rows
    pair_of_row = lax.dynamic_slice_in_dim(pairs.pair_of_row, start, turn_rows)
    row = start + jnp.arange(turn_rows, dtype=jnp.int32)
    # A row's expert is the number of experts whose rows end before it.
    expert_of_row = jnp.sum(pairs.group_ends <= row[:, None], axis=1, dtype=jnp.int32)
    ends_in_turn = jnp.clip(pairs.group_ends - start, 0, turn_rows)
    row_in_turn = pairs.row_of_pair - start
    is_in_turn = (row_in_turn >= 0) & (row_in_turn < turn_rows)
    rows_of_token = jnp.where(is_in_turn, row_in_turn, turn_rows)
    routing = Routing(
        group_sizes=jnp.diff(ends_in_turn, prepend=jnp.zeros_like(ends_in_turn[:1])),
        expert_of_row=expert_of_row,
        token_of_row=pair_of_row % n_tokens,
        rows_of_token=rows_of_token,
    )
    # A weight belongs to one pair, which has one row at most.
    routing_of_pairs = routing._replace(
        token_of_row=pair_of_row, rows_of_token=rows_of_token.reshape(1, -1)
    )
    row_weights = read_tokens(weights.reshape(-1), routing_of_pairs)
    has_expert = expert_of_row < len(pairs.group_ends)
    return routing, jnp.where(has_expert, row_weights, 0)


def _run_experts(experts: Experts, gated: GatedActivation, turn: _Turn) -> jax.Array:
    """Returns the sums of a turn by an implementation that gives each row's output."""
    # A caller's own function of experts may have no parameter for biases.
    bias_option = {"biases": turn.biases} if turn.biases else {}
    rows = read_tokens(turn.tokens, turn.routing)
    # Rows of no expert have a weight of 0, so that any expert will do.
    expert_of_row = jnp.minimum(turn.routing.expert_of_row, turn.kernels[0].shape[0] - 1)
    out = experts(gated, rows, expert_of_row, *turn.kernels, **bias_option)
    return sum_rows(_weighted(out, turn.weights), turn.routing)


def _run_by_kernels(gated: GatedActivation, turn: _Turn) -> jax.Array:
    """Returns the sums of a turn by ragged products of the sorted rows.

    The routing weights are applied before the last product. Their gradient then needs nothing that
    this product returns.
    """
    routing = turn.routing
    *up_kernels, down_kernel = turn.kernels
    rows = read_tokens(turn.tokens, routing)
    products = multiply_rows(ProductOfRows(rows, turn.tokens, tuple(up_kernels), routing))
    if turn.biases:
        *up_biases, down_bias = turn.biases
        products = [
            product + _vector_of_row(bias, routing)
            for product, bias in zip(products, up_biases, strict=True)
        ]
    features = gated(*(name_mlp_product(product, PRODUCTS) for product in products))
    weighted = _weighted(features, turn.weights).astype(features.dtype)
    sums = sum_products(SumOfProducts(weighted, turn.weights, down_kernel, routing))
    if not turn.biases:
        return sums
    return sums + sum_rows(_weighted(_vector_of_row(down_bias, routing), turn.weights), routing)


def _vector_of_row(vectors: jax.Array, routing: Routing) -> jax.Array:
    """Returns the vector of each row's expert, from [experts, …]; zeros for rows of no expert."""
    return vectors.at[routing.expert_of_row].get(mode="fill", fill_value=0)


def _weighted(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns rows times their routing weights, in the dtype of the weights."""
    return rows.astype(weights.dtype) * weights[:, None]
