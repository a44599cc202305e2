"""Chooses next tokens by their logits: greedily, or drawn from all or from likely ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax import lax


class SamplingKeywords(TypedDict, total=False):
    """The keywords of ``generate`` that choose the next tokens."""

    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    temperature: float
    top_p: float
    top_k: int | None
    key: jax.Array | None


class Sampling(NamedTuple):
    """The options that choose the next tokens, [] each but for ``eos``; see ``generate``.

    Attributes:
      eos: [n] int32.
      key: [] or [batch] keys.
    """

    eos: jax.Array
    pad: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    key: jax.Array


def choose(logits: jax.Array, choice: Sampling, key: jax.Array) -> jax.Array:
    """Chooses the next tokens, [batch] int32, by logits, [batch, vocab]; sorts for a limit only."""
    vocab = logits.shape[-1]

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def likely(scores: jax.Array) -> jax.Array:
        ranked = -jnp.sort(-scores, axis=-1)
        rank = jnp.arange(vocab, dtype=jnp.int32)
        ranked = jnp.where(rank < choice.top_k, ranked, -jnp.inf)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the more likely tokens
        kept = (rank == 0) | ((rank < choice.top_k) & (before < choice.top_p))
        least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores >= least, scores, -jnp.inf)

    def drawn(scores: jax.Array) -> jax.Array:
        draw = jax.random.categorical
        if has_row_keys(key):
            draw = jax.vmap(draw)
        return draw(key, scores).astype(jnp.int32)

    def of_all(logits: jax.Array) -> jax.Array:
        return drawn(logits / choice.temperature)

    def of_likely(logits: jax.Array) -> jax.Array:
        return drawn(likely(logits / choice.temperature))

    limited = ((choice.top_p < 1) | (choice.top_k < vocab)).astype(jnp.int32)
    how = jnp.where(choice.temperature > 0, 1 + limited, 0)
    chosen: jax.Array = lax.switch(how, [greedy, of_all, of_likely], logits)
    return chosen


def log_probability(logits: jax.Array, tokens: jax.Array, temperature: jax.Array) -> jax.Array:
    """Returns log p of tokens, [batch], in the whole vocabulary; at temperature 1 where it is 0."""
    scores = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)
    of_tokens = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
    return of_tokens - jax.nn.logsumexp(scores, axis=-1)


def has_row_keys(key: jax.Array) -> bool:
    """Returns whether these are keys, one a row; an old key (`jax.random.PRNGKey`) is one."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim > 0
