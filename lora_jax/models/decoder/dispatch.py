"""One part of a mixture's experts, for the tokens that chose them.

Tokens are read into the rows of their experts, and rows are read back into the sums of tokens: each
is the other's derivative, so that nothing is scattered, sums have a fixed order, and no array holds
all (token, expert) pairs of a batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.decoder.experts import Experts, Gated

UNEVEN = "uneven_choice_of_experts"  # scope of what runs if a part has more rows than its share
_SLACK = 1.25  # of a part of all experts, over an equal share of the pairs
_SUBLANES = 8  # a turn's rows are a multiple; see `experts`


def apply_own(
    experts: Experts,
    shares: int,
    gated: Gated,
    tokens: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    *kernels: jax.Array,
    biases: Sequence[jax.Array] = (),
) -> jax.Array:
    """Applies one of several equal parts of all experts, and returns the weighted sums of tokens.

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
    n, last, shape = chosen.size, kernels[0].shape[0] - 1, chosen.shape
    chosen, more = chosen.reshape(-1), {"biases": biases} if biases else {}
    is_own = (chosen >= 0) & (chosen <= last)
    turn = min(-(-round(_SLACK * n) // (_SUBLANES * shares)), -(-n // _SUBLANES)) * _SUBLANES
    order = jnp.argsort(jnp.where(is_own, chosen, last + 1))  # stable: those of other parts last
    places = jnp.argsort(order)
    n_own = jnp.sum(is_own, dtype=order.dtype)
    pairs = jnp.pad(order, (0, -n % turn)).reshape(-1, turn)
    begins = turn * jnp.arange(len(pairs), dtype=order.dtype)

    def sums(begin: jax.Array, pairs: jax.Array) -> jax.Array:
        here = begin + jnp.arange(turn, dtype=order.dtype) < n_own
        is_here = is_own & (places >= begin) & (places < begin + turn)
        rows_of = jnp.where(is_here, places - begin, turn).reshape(shape)
        rows = _read_tokens(tokens, pairs % shape[1], rows_of)
        of_rows = jnp.where(here, chosen[pairs], last).astype(chosen.dtype)  # the rest: any will do
        out = experts(gated, rows, of_rows, *kernels, **more)
        of_pairs = jnp.where(here, weights.reshape(-1)[pairs], 0)
        return _sum_rows(out, of_pairs, pairs % shape[1], rows_of)

    total = sums(begins[0], pairs[0])
    if len(pairs) == 1:
        return total
    nothing = jnp.zeros_like(total)

    def later(total: jax.Array, args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + lax.cond(args[0] < n_own, sums, lambda *_: nothing, *args), None

    def left_over(total: jax.Array) -> jax.Array:
        body = jax.checkpoint(later, prevent_cse=False)
        total, _ = lax.scan(body, total, (begins[1:], pairs[1:]))
        return total

    with jax.named_scope(UNEVEN):
        whole: jax.Array = lax.cond(turn < n_own, left_over, lambda total: total, total)
    return whole


@jax.custom_vjp
def _read_tokens(tokens: jax.Array, tokens_of: jax.Array, rows_of: jax.Array) -> jax.Array:
    """Returns the token of each row.

    Args:
      tokens: [tokens, d_model].
      tokens_of: [rows] int, the token of each row.
      rows_of: [k, tokens] int, the rows of each token; the number of rows stands for none.
    """
    del rows_of
    return tokens[tokens_of]


def _read_tokens_forward(
    tokens: jax.Array, tokens_of: jax.Array, rows_of: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _read_tokens(tokens, tokens_of, rows_of), rows_of


def _read_tokens_backward(rows_of: jax.Array, ct: jax.Array) -> tuple[jax.Array, None, None]:
    return _added(ct, None, rows_of).astype(ct.dtype), None, None


_read_tokens.defvjp(_read_tokens_forward, _read_tokens_backward)


@jax.custom_vjp
def _sum_rows(
    rows: jax.Array, weights: jax.Array, tokens_of: jax.Array, rows_of: jax.Array
) -> jax.Array:
    """Returns the weighted sum of each token's rows, [tokens, d_model] fp32.

    Args:
      rows: [rows, d_model].
      weights: [rows] fp32; zeros for rows of no token.
      tokens_of, rows_of: see `_read_tokens`.
    """
    del tokens_of
    return _added(rows, weights, rows_of)


def _sum_rows_forward(
    rows: jax.Array, weights: jax.Array, tokens_of: jax.Array, rows_of: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _added(rows, weights, rows_of), (rows, weights, tokens_of)


def _sum_rows_backward(
    kept: tuple[jax.Array, jax.Array, jax.Array], ct: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    rows, weights, tokens_of = kept
    of_rows = ct[tokens_of]
    of_weights = jnp.sum(rows.astype(ct.dtype) * of_rows, axis=-1)
    return (of_rows * weights[:, None]).astype(rows.dtype), of_weights, None, None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def _added(rows: jax.Array, weights: jax.Array | None, rows_of: jax.Array) -> jax.Array:
    """Returns the sums of each token's rows, fp32; zeros stand for a row that is none."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)

    def read(array: jax.Array, at: jax.Array) -> jax.Array:
        return array.at[at].get(mode="fill", fill_value=0).astype(dtype)

    def term(at: jax.Array) -> jax.Array:
        return read(rows, at) if weights is None else read(rows, at) * read(weights, at)[:, None]

    total = term(rows_of[0])
    for at in rows_of[1:]:
        total = total + term(at)
    return total
