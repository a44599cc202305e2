"""The gated delta rule and the short causal convolution before it: what a linear layer computes."""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CHUNK = 64


class RecurrentTokens(NamedTuple):
    """The tokens of one call, as layers with a recurrent state see them.

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
    """Computes the gated delta rule (Yang et al. 2025), a chunk of tokens at a time.

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

    def cut(x: jax.Array, mode: str = "constant") -> jax.Array:
        """Returns [chunks, batch, heads, size, …] of [batch, seq, heads, …]."""
        x = jnp.pad(x, [(0, 0), (0, -seq % size), *[(0, 0)] * (x.ndim - 2)], mode=mode)
        x = x.reshape(batch, -1, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    q, k, v, beta = cut(q), cut(k), cut(v), cut(beta)[..., None]
    total = jnp.cumsum(cut(log_decay), axis=-1)
    whole = jnp.tril(jnp.ones((size, size), bool))  # what a token sees of its chunk
    since, until, through = (jnp.ones((), bool),) * 3
    if segments is not None:
        own = cut(segments[..., None], "edge")
        last = own[..., -1:]
        before = jnp.concatenate([own[:1, ..., :1], last[:-1]])
        whole = whole & (own[..., :, None] == own[..., None, :])
        # Segments are contiguous: equal ends have nothing else between them.
        since, until, through = own == before, own == last, last == before
    # Masked before exp: what is not seen would overflow, and its derivative be no number.
    between = jnp.exp(jnp.where(whole, total[..., :, None] - total[..., None, :], -jnp.inf))

    def decay(log: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.where(where, jnp.exp(log), 0)[..., None]

    from_before = decay(total, since)
    weights = jnp.einsum("...id,...jd->...ij", q, k) * between
    values, keys = beta * v, beta * from_before * k
    if size > 1:
        system = jnp.tril(beta * jnp.einsum("...id,...jd->...ij", k, k) * between, -1)
        both = inverse_plus_one(system) @ jnp.concatenate([values, keys], axis=-1)
        values, keys = jnp.split(both, [v.shape[-1]], axis=-1)

    def through_chunk(state: jax.Array, of: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        reads, weights, values, keys, writes, through = of
        new = values - keys @ state
        out = reads @ state + weights @ new
        return through * state + writes.swapaxes(-1, -2) @ new, out

    to_end = decay(total[..., -1:] - total, until)
    through = decay(total[..., -1:], through)
    each = (q * from_before, weights, values, keys, k * to_end, through)
    state, out = lax.scan(through_chunk, state, each)
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, -1, heads, v.shape[-1])
    return out[:, :seq], state


def chunk_size(seq: int) -> int:
    """Returns the tokens of a chunk, a power of two."""
    return int(min(CHUNK, 1 << (seq - 1).bit_length()))


@jax.custom_jvp
def inverse_plus_one(system: jax.Array) -> jax.Array:
    """Returns the inverse of 1 + a strictly lower triangular matrix, by products of matrices.

    The inverses of two blocks on the diagonal give that of both together, whose size is twice as
    large. Products are in full precision, since errors would add up.

    Args:
      system: [..., n, n], n a power of two.
    """
    size = system.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=system.dtype), system.shape)
    for block in (1 << level for level in range(size.bit_length() - 1)):
        row, column = np.indices((size, size)) // block
        beside = jnp.where((row == column + 1) & (row % 2 == 1), system, 0)
        inverse -= beside if block == 1 else _exactly(inverse, beside, inverse)
    return inverse


@inverse_plus_one.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    inverse = inverse_plus_one(*primals)
    return inverse, -_exactly(inverse, *tangents, inverse)


def _exactly(*factors: jax.Array) -> jax.Array:
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return functools.reduce(product, factors)


def short_convolution(
    x: jax.Array, taps: jax.Array, tokens: RecurrentTokens, tail: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the weighted sum of each token and those before it, channel by channel.

    Args:
      x: [batch, seq, channels].
      taps: [channels, 1, n]; the last one weighs the token itself.
      tokens: padding and segments; a sum ends at the start of a segment.
      tail: [batch, n - 1, channels], the real tokens before these; None for none. With it, padding
        may lie anywhere.

    Returns:
      [batch, seq, channels] in the dtype of the taps, and the new tail.
    """
    seq, n = x.shape[1], taps.shape[-1]
    present, segments = tokens
    taps = taps[:, 0].T
    if tail is None:
        x = jnp.pad(jnp.where(present[..., None], x, 0), ((0, 0), (n - 1, 0), (0, 0)))
        parts = [x[:, i : i + seq] for i in range(n)]
        if segments is not None:
            known = jnp.pad(segments, ((0, 0), (n - 1, 0)), mode="edge")
            same = [known[:, i : i + seq] == segments for i in range(n)]
            parts = [jnp.where(s[..., None], part, 0) for s, part in zip(same, parts, strict=True)]
        products = [tap * part for tap, part in zip(taps, parts, strict=True)]
        return cast(jax.Array, sum(products)), None
    # Real tokens first, so that those before each one stand beside it.
    count = jnp.cumsum(present, axis=1)
    order = jnp.argsort(~present, axis=1, stable=True)
    x = jnp.concatenate([tail, jnp.take_along_axis(x, order[..., None], axis=1)], axis=1)
    y = sum(tap * x[:, i : i + seq] for i, tap in enumerate(taps))
    y = jnp.take_along_axis(y, jnp.maximum(count - 1, 0)[..., None], axis=1)
    at = count[:, -1:] + jnp.arange(n - 1)
    return y, jnp.take_along_axis(x, at[..., None], axis=1)


def normalise(x: jax.Array) -> jax.Array:
    """Returns vectors of length one, along the last axis."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
