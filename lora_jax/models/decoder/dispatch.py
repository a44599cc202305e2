"""Computes one shard of a mixture's experts for the tokens that chose them.

A pair is a token with one of its k experts, and a row is the place of a pair in the experts' input.
Tokens are read into the rows of their experts, and rows are read back into the sums of tokens: each
is the other's derivative, so that nothing is scattered, sums have a fixed order, and no array holds
all pairs of a batch. A turn is a fixed number of rows.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.decoder.experts import Experts, GatedActivation

UNEVEN = "uneven_choice_of_experts"  # scope of what runs if a part has more rows than its share
_SLACK = 1.25  # rows of the first turn, over an equal share of the pairs
_SUBLANES = 8  # a turn's rows are a multiple; see `experts`


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
    left over goes in further turns, which do nothing if there is nothing: no pair is lost, whatever
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
    k, n_tokens = chosen.shape
    n_pairs = chosen.size
    last_expert = kernels[0].shape[0] - 1
    # A caller's own function of experts may have no parameter for biases.
    bias_option = {"biases": biases} if biases else {}
    chosen = chosen.reshape(-1)  # the expert of each pair
    is_own = (chosen >= 0) & (chosen <= last_expert)
    # The sort is stable, and pairs of other parts come last.
    pair_of_row = jnp.argsort(jnp.where(is_own, chosen, last_expert + 1))
    row_of_pair = jnp.argsort(pair_of_row)
    row_dtype = pair_of_row.dtype
    n_own = jnp.sum(is_own, dtype=row_dtype)
    # A turn has room for an equal share of all pairs and some more, in whole tiles of rows.
    share_tiles = -(-round(_SLACK * n_pairs) // (_SUBLANES * shares))
    all_tiles = -(-n_pairs // _SUBLANES)
    turn_rows = _SUBLANES * min(share_tiles, all_tiles)
    turn_pairs = jnp.pad(pair_of_row, (0, -n_pairs % turn_rows)).reshape(-1, turn_rows)
    turn_starts = turn_rows * jnp.arange(len(turn_pairs), dtype=row_dtype)

    def run_turn(start: jax.Array, pairs: jax.Array) -> jax.Array:
        """Returns the sums over one block of rows, from row `start` on."""
        is_row_own = start + jnp.arange(turn_rows, dtype=row_dtype) < n_own
        is_in_turn = is_own & (row_of_pair >= start) & (row_of_pair < start + turn_rows)
        rows_of_token = jnp.where(is_in_turn, row_of_pair - start, turn_rows).reshape(k, n_tokens)
        token_of_row = pairs % n_tokens
        rows = _read_tokens(tokens, token_of_row, rows_of_token)
        # Rows of other parts have a weight of 0, so that any expert will do.
        expert_of_row = jnp.where(is_row_own, chosen[pairs], last_expert).astype(chosen.dtype)
        out = experts(gated, rows, expert_of_row, *kernels, **bias_option)
        weight_of_row = jnp.where(is_row_own, weights.reshape(-1)[pairs], 0)
        return _sum_rows(out, weight_of_row, token_of_row, rows_of_token)

    total = run_turn(turn_starts[0], turn_pairs[0])
    if len(turn_pairs) == 1:  # one turn has room for all pairs
        return total
    zeros = jnp.zeros_like(total)

    def add_turn(total: jax.Array, turn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        start, pairs = turn
        sums = lax.cond(start < n_own, run_turn, lambda *_: zeros, start, pairs)
        return total + sums, None

    def add_further_turns(total: jax.Array) -> jax.Array:
        body = jax.checkpoint(add_turn, prevent_cse=False)
        total, _ = lax.scan(body, total, (turn_starts[1:], turn_pairs[1:]))
        return total

    # Further turns run only if this part has more pairs than the first turn has rows.
    with jax.named_scope(UNEVEN):
        is_uneven = turn_rows < n_own
        sums: jax.Array = lax.cond(is_uneven, add_further_turns, lambda total: total, total)
    return sums


@jax.custom_vjp
def _read_tokens(tokens: jax.Array, token_of_row: jax.Array, rows_of_token: jax.Array) -> jax.Array:
    """Returns the token vector of each row.

    Args:
      tokens: [tokens, d_model].
      token_of_row: [rows] int.
      rows_of_token: [k, tokens] int; the number of rows stands for no row.
    """
    del rows_of_token
    return tokens[token_of_row]


def _read_tokens_forward(
    tokens: jax.Array, token_of_row: jax.Array, rows_of_token: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _read_tokens(tokens, token_of_row, rows_of_token), rows_of_token


def _read_tokens_backward(
    rows_of_token: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, None, None]:
    return _sum_rows_of_tokens(cotangent, None, rows_of_token).astype(cotangent.dtype), None, None


_read_tokens.defvjp(_read_tokens_forward, _read_tokens_backward)


@jax.custom_vjp
def _sum_rows(
    rows: jax.Array, weights: jax.Array, token_of_row: jax.Array, rows_of_token: jax.Array
) -> jax.Array:
    """Returns the weighted sum of each token's rows, [tokens, d_model] fp32.

    Args:
      rows: [rows, d_model].
      weights: [rows] fp32; zeros for rows of no token.
      token_of_row, rows_of_token: see `_read_tokens`.
    """
    del token_of_row
    return _sum_rows_of_tokens(rows, weights, rows_of_token)


def _sum_rows_forward(
    rows: jax.Array, weights: jax.Array, token_of_row: jax.Array, rows_of_token: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _sum_rows_of_tokens(rows, weights, rows_of_token), (rows, weights, token_of_row)


def _sum_rows_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    """Returns the gradients of rows and weights."""
    rows, weights, token_of_row = residuals
    row_cotangents = cotangent[token_of_row]
    weight_gradients = jnp.sum(rows.astype(cotangent.dtype) * row_cotangents, axis=-1)
    row_gradients = (row_cotangents * weights[:, None]).astype(rows.dtype)
    return row_gradients, weight_gradients, None, None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def _sum_rows_of_tokens(
    rows: jax.Array, weights: jax.Array | None, rows_of_token: jax.Array
) -> jax.Array:
    """Returns the sum of each token's rows, fp32; missing rows count as zeros."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)

    def read(array: jax.Array, indices: jax.Array) -> jax.Array:
        return array.at[indices].get(mode="fill", fill_value=0).astype(dtype)

    def read_weighted(indices: jax.Array) -> jax.Array:
        if weights is None:
            return read(rows, indices)
        return read(rows, indices) * read(weights, indices)[:, None]

    total = read_weighted(rows_of_token[0])
    for indices in rows_of_token[1:]:
        total = total + read_weighted(indices)
    return total
