"""Softmax attention with all its scores at once, and products that are never narrower than fp32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.layers.masks import Mask


def wide(dtype: Any) -> Any:
    """Returns fp32, or the dtype itself if it is wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def dot_wide(x: jax.Array, y: jax.Array, contract: Any, precision: Any = None) -> jax.Array:
    """Computes ``lax.dot_general`` with a result of at least fp32: for logits."""
    return lax.dot_general(
        x, y, contract, precision=precision, preferred_element_type=wide(x.dtype)
    )


def dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float | jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Computes attention with all scores at once, [batch, heads, seq, keys]; see ``attend``.

    Heads lead in all operands, and the result is divided rather than the weights: otherwise XLA
    copies scores into another layout on CPU, and keeps both them and the weights for the backward
    pass.
    """
    batch, seq, _, head_dim = q.shape
    dtype = wide(q.dtype)
    grouped = q.reshape(batch, seq, k.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))
    scores = jnp.einsum("bngsd,bntd->bngst", grouped, keys, preferred_element_type=dtype)
    scores = soft_cap(scores * score_scale(q, scale), cap)
    scores = jnp.where(mask.visible()[:, None, None], scores, jnp.finfo(dtype).min)
    # The maximum changes no result, and so needs no derivative.
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bngst,bntd->bngsd", weights, values, preferred_element_type=dtype)
    return (out / total).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def score_scale(q: jax.Array, scale: float | jax.Array | None) -> jax.Array:
    """Returns the factor of the scores, [] in their dtype: 1 / sqrt(head_dim) by default."""
    return jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, wide(q.dtype))


def scaled(q: jax.Array, scale: float | jax.Array | None) -> jax.Array:
    """Returns queries with the factor of their scores, for kernels that take no traced factor."""
    factor = score_scale(q, scale)
    return (q.astype(factor.dtype) * factor).astype(q.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns cap tanh(x / cap): x where it is small, never beyond ±cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
