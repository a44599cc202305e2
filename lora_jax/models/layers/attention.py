"""Softmax attention, and products that are never narrower than fp32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def wide(dtype: Any) -> Any:
    """Returns fp32, or the dtype itself if it is wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def dot_wide(x: jax.Array, y: jax.Array, contract: Any, precision: Any = None) -> jax.Array:
    """Computes ``lax.dot_general`` with a result of at least fp32: for logits."""
    return lax.dot_general(
        x, y, contract, precision=precision, preferred_element_type=wide(x.dtype)
    )


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float | jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Computes softmax(soft_cap(scale * q k^T)) v, scores and softmax in fp32.

    Args:
      q: [batch, seq, heads, head_dim].
      k: [batch, keys, kv_heads, head_dim]. Queries are grouped by key/value head, so that keys and
        values are never repeated in memory.
      v: as k.
      mask: [batch, 1, seq or 1, keys] bool. A query that may look nowhere (padding) averages all
        values.
      scale: a number or []; 1 / sqrt(head_dim) by default.
      cap: see ``soft_cap``.

    Returns:
      [batch, seq, heads, head_dim].
    """
    batch, seq, heads, head_dim = q.shape
    dtype = wide(q.dtype)
    scale = jnp.asarray(head_dim**-0.5 if scale is None else scale, dtype)
    grouped = q.reshape(batch, seq, k.shape[2], -1, head_dim)
    scores = jnp.einsum("bsngd,btnd->bngst", grouped, k, preferred_element_type=dtype)
    scores = soft_cap(scores * scale, cap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(dtype).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bngst,btnd->bsngd", probs, v).reshape(q.shape)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns cap tanh(x / cap): x where it is small, never beyond ±cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
