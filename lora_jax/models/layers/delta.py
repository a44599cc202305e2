"""Computations of linear layers: the gated delta rule, and a short causal convolution.

A state is a head's matrix S, which each token changes. A chunk is a number of consecutive tokens
that are computed together; `entry` is the state before a chunk's first token.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CHUNK = 64


class RecurrentTokens(NamedTuple):
    """The tokens of a call, as layers with a recurrent state see them.

    Attributes:
      present: [batch, seq] bool, False at padding, which changes no state.
      segments: [batch, seq] int32, the contiguous segments of a row, each of which begins with an
        empty state; None where each row is one sequence.
    """

    present: jax.Array
    segments: jax.Array | None


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the gated delta rule (Yang et al. 2025), one chunk of tokens at a time.

    Each token changes a head's state S, [key_dim, value_dim], and reads it:

        S = exp(log_decay) S;  S = S + k beta (v - k S);  output = q S

    Within a chunk that is a triangular system of equations and a few products; a scan takes S from
    chunk to chunk. With one token it is the step above.

    Args:
      q, k: [batch, seq, heads, key_dim].
      v: [batch, seq, heads, value_dim].
      log_decay: [batch, seq, heads], 0 at most.
      beta: [batch, seq, heads]; with 0, and a log_decay of 0, a token leaves the state as it is.
      state: [batch, heads, key_dim, value_dim], before the first token.
      segments: [batch, seq] int32: a token whose segment is not that of the one before it finds an
        empty state; None where there is one segment, which goes on from ``state``.

    Returns:
      The outputs, [batch, seq, heads, value_dim], and the state after the last token.
    """
    batch, seq, heads, _ = k.shape
    size = chunk_size(seq)

    def cut_into_chunks(x: jax.Array, mode: str = "constant") -> jax.Array:
        """Reshapes [batch, seq, heads, …] to [chunks, batch, heads, size, …]."""
        x = jnp.pad(x, [(0, 0), (0, -seq % size), *[(0, 0)] * (x.ndim - 2)], mode=mode)
        x = x.reshape(batch, -1, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    q, k, v = cut_into_chunks(q), cut_into_chunks(k), cut_into_chunks(v)
    beta = cut_into_chunks(beta)[..., None]
    # The decay of the state from the chunk's start up to each token: [chunks, batch, heads, size].
    log_total = jnp.cumsum(cut_into_chunks(log_decay), axis=-1)

    # Which tokens a state, or another token, still reaches; segments hide all others.
    sees_entry = reaches_end = entry_reaches_end = jnp.ones((), bool)
    is_visible = jnp.tril(jnp.ones((size, size), bool))  # tokens of the chunk, for a token
    if segments is not None:
        chunk_segments = cut_into_chunks(segments[..., None], "edge")
        end_segment = chunk_segments[..., -1:]
        entry_segment = jnp.concatenate([chunk_segments[:1, ..., :1], end_segment[:-1]])
        is_visible = is_visible & (chunk_segments[..., :, None] == chunk_segments[..., None, :])
        # Segments are contiguous: between two tokens of one segment lie no others.
        sees_entry = chunk_segments == entry_segment
        reaches_end = chunk_segments == end_segment
        entry_reaches_end = end_segment == entry_segment
    # The decay between each two tokens of a chunk: [..., size, size]. It is masked before exp:
    # decays of hidden tokens would overflow, and their derivatives be NaN.
    log_between = log_total[..., :, None] - log_total[..., None, :]
    decay_between = jnp.exp(jnp.where(is_visible, log_between, -jnp.inf))

    def masked_decay(log: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, jnp.exp(log), 0)[..., None]

    # The updates of a chunk's tokens depend on each other: they solve a triangular system.
    decay_from_entry = masked_decay(log_total, sees_entry)
    weights = jnp.einsum("...id,...jd->...ij", q, k) * decay_between
    values = beta * v
    keys = beta * decay_from_entry * k
    if size > 1:  # a single token depends on the state alone
        system = jnp.tril(beta * jnp.einsum("...id,...jd->...ij", k, k) * decay_between, -1)
        solved = invert_one_plus(system) @ jnp.concatenate([values, keys], axis=-1)
        values, keys = jnp.split(solved, [v.shape[-1]], axis=-1)

    def run_chunk(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        entry_queries, weights, values, keys, end_keys, entry_decay = chunk
        updates = values - keys @ state
        out = entry_queries @ state + weights @ updates
        return entry_decay * state + end_keys.swapaxes(-1, -2) @ updates, out

    # A scan carries the state from chunk to chunk.
    log_end = log_total[..., -1:]
    decay_to_end = masked_decay(log_end - log_total, reaches_end)
    entry_decay = masked_decay(log_end, entry_reaches_end)
    chunks = (q * decay_from_entry, weights, values, keys, k * decay_to_end, entry_decay)
    state, out = lax.scan(run_chunk, state, chunks)
    # From [chunks, batch, heads, size, value_dim] to [batch, seq, heads, value_dim].
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, -1, heads, v.shape[-1])
    return out[:, :seq], state


def chunk_size(seq: int) -> int:
    """Returns the number of tokens in a chunk, a power of two."""
    return int(min(CHUNK, 1 << (seq - 1).bit_length()))


@jax.custom_jvp
def invert_one_plus(system: jax.Array) -> jax.Array:
    """Returns (1 + a)⁻¹ of a strictly lower triangular matrix a, by matrix products.

    The inverses of two blocks on the diagonal give that of both together, whose size is twice as
    large. Products are in full precision, since errors would add up.

    Args:
      system: [..., n, n], n a power of two.
    """
    size = system.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=system.dtype), system.shape)
    for level in range(size.bit_length() - 1):
        block_size = 1 << level
        row_block, column_block = np.indices((size, size)) // block_size
        is_below_diagonal = (row_block == column_block + 1) & (row_block % 2 == 1)
        below_diagonal = jnp.where(is_below_diagonal, system, 0)
        if level == 0:  # the inverse is 1 so far
            inverse -= below_diagonal
        else:
            inverse -= _multiply_exactly(inverse, below_diagonal, inverse)
    return inverse


@invert_one_plus.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    inverse = invert_one_plus(*primals)
    return inverse, -_multiply_exactly(inverse, *tangents, inverse)


def _multiply_exactly(*factors: jax.Array) -> jax.Array:
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return functools.reduce(product, factors)


def short_convolution(
    x: jax.Array, taps: jax.Array, tokens: RecurrentTokens, tail: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the weighted sum of each token and the tokens before it, per channel.

    Args:
      x: [batch, seq, channels].
      taps: [channels, 1, n]; the last one weighs the token itself.
      tokens: padding and segments; a sum ends at the start of a segment.
      tail: [batch, n - 1, channels], the real tokens before these; None for none. With it, padding
        may lie anywhere.

    Returns:
      [batch, seq, channels] in the dtype of the taps, and the new tail.
    """
    present, segments = tokens
    if tail is None:  # no cache: the row begins here
        x = jnp.where(present[..., None], x, 0)
        return _convolve_segments(x, taps[:, 0].T, segments), None
    seq, n_taps = x.shape[1], taps.shape[-1]
    # Real tokens come first, so that those before each one stand beside it.
    count = jnp.cumsum(present, axis=1)  # real tokens up to each one
    order = jnp.argsort(~present, axis=1, stable=True)
    x = jnp.concatenate([tail, jnp.take_along_axis(x, order[..., None], axis=1)], axis=1)
    sums = sum(tap * x[:, i : i + seq] for i, tap in enumerate(taps[:, 0].T))
    # Each sum goes back to the place of its token.
    sum_of_token = jnp.maximum(count - 1, 0)
    sums = jnp.take_along_axis(sums, sum_of_token[..., None], axis=1)
    tail_indices = count[:, -1:] + jnp.arange(n_taps - 1)
    return sums, jnp.take_along_axis(x, tail_indices[..., None], axis=1)


def _convolve_segments(x: jax.Array, taps: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Computes ``short_convolution`` of rows without a tail, zero-padded.

    Args:
      x: [batch, seq, channels].
      taps: [n, channels].
      segments: see ``short_convolution``.
    """
    seq, n_taps = x.shape[1], len(taps)
    x = jnp.pad(x, ((0, 0), (n_taps - 1, 0), (0, 0)))
    shifted = [x[:, i : i + seq] for i in range(n_taps)]
    if segments is not None:
        padded = jnp.pad(segments, ((0, 0), (n_taps - 1, 0)), mode="edge")
        for i in range(n_taps):
            is_same_segment = padded[:, i : i + seq] == segments
            shifted[i] = jnp.where(is_same_segment[..., None], shifted[i], 0)
    products = [tap * tokens for tap, tokens in zip(taps, shifted, strict=True)]
    return cast(jax.Array, sum(products))


def normalise(x: jax.Array) -> jax.Array:
    """Returns vectors scaled to length one along the last axis."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
