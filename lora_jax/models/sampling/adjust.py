"""Adjusts logits before a token is chosen: allowed tokens, biases, penalties, min_p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)
NO_TOKEN = np.iinfo(np.int32).max  # fills up rows of token ids
_BITS = 32  # of a word


class Adjustments(NamedTuple, Generic[ArrayT]):
    """Adjustments of logits by row; `neutral_adjustments` leave logits bitwise unchanged.

    Attributes:
      allowed: [rows, `mask_words`] uint32: bit i % 32 of word i // 32 is 1 where token i may come.
      bias_ids, biases: [rows, k] int32 and fp32; biases are added to the logits of these tokens.
      repetition: [rows] fp32; divides positive logits of tokens that were there, and multiplies
        negative ones.
      frequency, presence: [rows] fp32; subtracted for each time that a token was drawn, and once.
      min_p: [rows] fp32, the least probability, relative to that of the likeliest token.
      tokens: [rows, length] int32, the prompt's tokens and those drawn, then `NO_TOKEN`.
      n_prompt: [rows] int32, how many of `tokens` are the prompt's.
    """

    allowed: ArrayT
    bias_ids: ArrayT
    biases: ArrayT
    repetition: ArrayT
    frequency: ArrayT
    presence: ArrayT
    min_p: ArrayT
    tokens: ArrayT
    n_prompt: ArrayT


def mask_words(vocab: int) -> int:
    """Returns the number of 32-bit words in a vocabulary mask."""
    return -(-vocab // _BITS)


def pack_mask(ids: Sequence[int], vocab: int) -> np.ndarray:
    """Returns a vocabulary mask, [words] uint32, with these token ids set."""
    bits = np.zeros(mask_words(vocab) * _BITS, bool)
    bits[np.asarray(ids, np.int64)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def remove_tokens(mask: np.ndarray, ids: Sequence[int]) -> None:
    """Clears token ids in a vocabulary mask, [words] uint32, in place."""
    tokens = np.asarray(ids, np.uint32)
    np.bitwise_and.at(mask, tokens // _BITS, ~(np.uint32(1) << (tokens % np.uint32(_BITS))))


def neutral_adjustments(
    rows: int, vocab: int, *, length: int, biases: int
) -> Adjustments[np.ndarray]:
    """Returns adjustments without effect, as NumPy arrays.

    Args:
      rows, vocab: the shape of the logits.
      length: the most tokens of a row.
      biases: the most biases of a row.
    """
    return Adjustments(
        allowed=np.full((rows, mask_words(vocab)), 0xFFFFFFFF, np.uint32),
        bias_ids=np.full((rows, biases), NO_TOKEN, np.int32),
        biases=np.zeros((rows, biases), np.float32),
        repetition=np.ones(rows, np.float32),
        frequency=np.zeros(rows, np.float32),
        presence=np.zeros(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        tokens=np.full((rows, length), NO_TOKEN, np.int32),
        n_prompt=np.zeros(rows, np.int32),
    )


def mask_logits(logits: jax.Array, allowed: jax.Array | np.ndarray) -> jax.Array:
    """Returns logits, [rows, vocab], with -inf where a mask, [rows, words] uint32, is 0."""
    token_ids = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
    word_of_token = jnp.asarray(allowed)[:, token_ids // _BITS]
    is_allowed = (word_of_token >> (token_ids % _BITS)) & 1 == 1
    return jnp.where(is_allowed, logits, -jnp.inf)


def adjust_logits(
    logits: jax.Array, adjustments: Adjustments[Any], temperature: jax.Array
) -> jax.Array:
    """Returns adjusted logits, with adjustments in the order of vLLM's sampler.

    Masks come first, then biases, penalties, and min_p, which counts probabilities at the
    temperature, before top_k and top_p. Source: vLLM's `v1/sample`.

    Args:
      logits: fp32 [rows, vocab].
      adjustments: adjustments of each row.
      temperature: [rows]; min_p counts at temperature 1 where it is 0.
    """
    logits = mask_logits(logits, adjustments.allowed)
    has_bias = jnp.any(adjustments.bias_ids != NO_TOKEN)
    logits = lax.cond(has_bias, _add_biases, _leave_unchanged, logits, adjustments)
    has_no_penalty = [
        jnp.all(adjustments.repetition == 1),
        jnp.all(adjustments.frequency == 0),
        jnp.all(adjustments.presence == 0),
    ]
    has_penalty = ~jnp.all(jnp.stack(has_no_penalty))
    logits = lax.cond(has_penalty, _penalize, _leave_unchanged, logits, adjustments)
    divisor = jnp.where(temperature > 0, temperature, 1.0)
    min_logit = jnp.max(logits, axis=-1) + divisor * jnp.log(adjustments.min_p)
    return jnp.where(logits < min_logit[:, None], -jnp.inf, logits)


def _leave_unchanged(logits: jax.Array, adjustments: Adjustments[Any]) -> jax.Array:
    return logits


def _add_biases(logits: jax.Array, adjustments: Adjustments[Any]) -> jax.Array:
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, adjustments.bias_ids].add(adjustments.biases, mode="drop")


def _penalize(logits: jax.Array, adjustments: Adjustments[Any]) -> jax.Array:
    """Returns logits with the three penalties applied; see ``Adjustments``."""
    tokens = adjustments.tokens
    rows = jnp.arange(len(logits))[:, None]
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    is_prompt = columns < adjustments.n_prompt[:, None]
    drawn_tokens = jnp.where(is_prompt, NO_TOKEN, tokens)
    counts = jnp.zeros(logits.shape, jnp.int32).at[rows, drawn_tokens].add(1, mode="drop")
    has_occurred = jnp.zeros(logits.shape, bool).at[rows, tokens].set(True, mode="drop")
    repetition = adjustments.repetition[:, None]
    penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(has_occurred, penalized, logits)
    logits -= adjustments.frequency[:, None] * counts.astype(jnp.float32)
    return logits - jnp.where(counts > 0, adjustments.presence[:, None], 0.0)
