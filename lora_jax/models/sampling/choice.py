"""Chooses next tokens from logits: greedily, or by sampling with top_k and top_p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class SamplingKeywords(TypedDict, total=False):
    """The keyword arguments of ``generate`` that control the choice of tokens."""

    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    temperature: float
    top_p: float
    top_k: int | None
    key: jax.Array | None


class Sampling(NamedTuple):
    """The options of the sampler; see ``generate``.

    Attributes:
      temperature, top_p: fp32, [] for all rows, or [rows].
      top_k: int32, likewise; the size of the vocabulary for all tokens.
      key: [] or [rows] keys.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    key: jax.Array


def has_row_keys(key: jax.Array) -> bool:
    """Returns True for one key per row; False for a single key, typed or raw."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim > 0


def row_keys(key: jax.Array, row_indices: jax.typing.ArrayLike) -> jax.Array:
    """Returns a key for each row, derived from the row's index, [rows]."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys: jax.Array = jax.vmap(jax.random.fold_in, (None, 0))(key, row_indices)
    return keys


def token_keys(key: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the keys of the next tokens.

    Args:
      key: [] for all rows together, or [rows].
      step: [] or [rows] int32, the number of tokens drawn before.
    """
    fold = jax.random.fold_in
    if has_row_keys(key):
        fold = jax.vmap(fold, (0, 0 if step.ndim else None))
    keys: jax.Array = fold(key, step)
    return keys


def choose_tokens(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """Chooses the next tokens, [rows] int32; sorts the vocabulary only for top_k or top_p.

    Args:
      logits: [rows, vocab].
      sampling: for all rows, or of each row.
      keys: keys of these tokens; see ``token_keys``.
    """
    is_greedy = sampling.temperature <= 0
    is_limited = (sampling.top_p < 1) | (sampling.top_k < logits.shape[-1])

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: jax.Array, scores: jax.Array) -> jax.Array:
        """Draws tokens, or chooses greedily in rows with temperature 0."""
        categorical = jax.random.categorical
        if has_row_keys(keys):
            categorical = jax.vmap(categorical)
        tokens = categorical(keys, scores).astype(jnp.int32)
        if not is_greedy.ndim:  # one temperature for all rows, which is above 0
            return tokens
        return jnp.where(is_greedy, greedy(logits), tokens)

    def draw_from_all(logits: jax.Array) -> jax.Array:
        return draw(logits, scale_logits(logits, sampling.temperature))

    def draw_from_likely(logits: jax.Array) -> jax.Array:
        return draw(logits, _mask_unlikely(scale_logits(logits, sampling.temperature), sampling))

    branch = jnp.where(jnp.all(is_greedy), 0, 1 + jnp.any(is_limited).astype(jnp.int32))
    tokens: jax.Array = lax.switch(branch, [greedy, draw_from_all, draw_from_likely], logits)
    return tokens


def scale_logits(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Returns logits divided by the temperature, fp32; unchanged if it is 0."""
    return logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)[..., None]


def log_probability(logits: jax.Array, tokens: jax.Array, temperature: jax.Array) -> jax.Array:
    """Returns log p of tokens, [rows], over the full vocabulary (temperature 1 for greedy)."""
    return log_probabilities(scale_logits(logits, temperature), tokens[:, None])[:, 0]


def log_probabilities(scores: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns log p of tokens, [..., k], under softmax(scores), [..., vocab]."""
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return jnp.take_along_axis(scores, tokens, axis=-1) - total


def find_likeliest(
    scores: jax.Array, k: int, wanted: jax.Array | np.bool_
) -> tuple[jax.Array, jax.Array]:
    """Returns ids and log-probabilities of the k most likely tokens; zeros if not wanted.

    Args:
      scores: fp32 [..., vocab].
      k: number of tokens; that of the vocabulary where it has fewer.
      wanted: [] bool.
    """
    k = min(k, scores.shape[-1])

    def rank(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        logps, ids = lax.top_k(jax.nn.log_softmax(scores), k)
        return ids, logps

    def skip(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (*scores.shape[:-1], k)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    ids, logps = lax.cond(wanted, rank, skip, scores)
    return ids, logps


def _mask_unlikely(scores: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns scores, [rows, vocab], with -inf outside top_k and top_p."""
    sorted_scores = -jnp.sort(-scores, axis=-1)
    rank = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    is_in_top_k = rank < sampling.top_k[..., None]
    probs = jax.nn.softmax(jnp.where(is_in_top_k, sorted_scores, -jnp.inf), axis=-1)
    mass_of_likelier = jnp.cumsum(probs, axis=-1) - probs
    is_in_top_p = mass_of_likelier < sampling.top_p[..., None]
    is_candidate = (rank == 0) | (is_in_top_k & is_in_top_p)
    candidates = jnp.where(is_candidate, sorted_scores, jnp.inf)
    min_score = jnp.min(candidates, axis=-1, keepdims=True)
    return jnp.where(scores >= min_score, scores, -jnp.inf)
